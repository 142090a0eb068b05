// Opens and forgets blocks, and fails if memory or descriptors grow: see blocks.test.mjs.

import assert from 'node:assert/strict'
import { readdirSync } from 'node:fs'

import { connect } from 'latzero'

const app = await connect(process.argv[2])
const made = await app.block('a', { shape: 1024, dtype: 'f8', create: true })

async function round (count) {
  for (let i = 0; i < count; i++) {
    const block = await app.block('a')
    await block.write((array) => { array[0] = i })
    const view = await block.view()
    assert.equal(view.array()[0], i)
    if (i % 2 === 0) block.close()
    if (i % 100 === 0) {
      globalThis.gc()
      // What was collected is let go of after this.
      await new Promise((resolve) => setImmediate(resolve))
    }
  }
  globalThis.gc()
  await app.ping()
  globalThis.gc()
  await new Promise((resolve) => setImmediate(resolve))
  return { rss: process.memoryUsage().rss, descriptors: readdirSync('/proc/self/fd').length }
}

const before = await round(1000)
const after = await round(9000)
assert.ok(after.descriptors <= before.descriptors + 100, JSON.stringify({ before, after }))
assert.ok(after.rss < before.rss + 48e6, JSON.stringify({ before, after }))
assert.ok((await made.read())[0] === 8999)
await app.close()
