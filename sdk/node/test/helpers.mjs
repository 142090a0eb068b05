// What the tests share: a server for each file, and apps that are closed when their test ends.

import { after, before } from 'node:test'

import { connect } from 'latzero'
import { server as start } from 'latzero/testing'

let number = 0

/** Starts a server for the tests of this file. */
export function withServer (...args) {
  const place = {}
  before(async () => { place.server = await start(...args) })
  after(() => place.server.close())
  return {
    get server () {
      return place.server
    },

    /** An app that is closed when the test `t` ends. */
    async app (t, id = 'app', pool = 'default', options = {}) {
      const app = await connect(place.server.url(id, pool), options)
      t.after(() => app.close())
      return app
    },

    /** An app that serves and one that calls, in a pool of their own. */
    async pair (t, options = {}) {
      const pool = `pool-${++number}`
      const serves = await this.app(t, `serves-${number}`, pool, options)
      return [serves, await this.app(t, `calls-${number}`, pool, options), pool]
    }
  }
}

/** A promise with the functions that settle it. */
export function promised () {
  let settle
  const promise = new Promise((resolve, reject) => { settle = { resolve, reject } })
  return { promise, ...settle }
}

/** What an async iterable gives, as an array. */
export async function all (iterable) {
  const items = []
  for await (const item of iterable) items.push(item)
  return items
}
