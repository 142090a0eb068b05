// What the tests share: a server for each file, and apps that are closed when their test ends.

import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { after, before } from 'node:test'
import { fileURLToPath } from 'node:url'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'

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

const here = fileURLToPath(new URL('.', import.meta.url))

/** Runs a script, which has `connect` and `url`; what it wrote and how it ended. */
export async function run (url, script, { args = [], rest = [], onLine, env } = {}) {
  const begin = "import { connect } from 'latzero'; const url = process.argv[1];"
  const child = spawn(process.execPath,
    [...args, '--input-type=module', '--eval', `${begin}\n${script}`, '--', url, ...rest],
    { cwd: here, env: { ...process.env, ...env }, stdio: ['ignore', 'pipe', 'pipe'] })
  const out = { stdout: '', stderr: '' }
  for (const name of ['stdout', 'stderr']) {
    child[name].setEncoding('utf8')
    child[name].on('data', (text) => {
      out[name] += text
      if (name === 'stdout') onLine?.(out.stdout, child)
    })
  }
  const [status, signal] = await once(child, 'close')
  return { status, signal, ...out }
}

/** A promise with the functions that settle it. */
export function promised () {
  let settle
  const promise = new Promise((resolve, reject) => { settle = { resolve, reject } })
  return { promise, ...settle }
}

/** Collects garbage again and again until `isDone()`. */
export async function collectUntil (isDone) {
  setFlagsFromString('--expose-gc')
  const collect = runInNewContext('gc')
  while (!isDone()) {
    // What `isDone` looked at is kept until the end of its turn.
    await new Promise((resolve) => setImmediate(resolve))
    collect()
  }
}

/** What an async iterable gives, as an array. */
export async function all (iterable) {
  const items = []
  for await (const item of iterable) items.push(item)
  return items
}
