// The end of processes, worker threads, and many calls.

import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'
import { test } from 'node:test'

import { connect } from 'latzero'
import { promised, run as runWith, withServer } from './helpers.mjs'

const place = withServer()
const here = fileURLToPath(new URL('.', import.meta.url))

/** Runs a script against the server of this file. */
const run = (script, { url = place.server.url('script'), ...options } = {}) =>
  runWith(url, script, options)

const quiet = { status: 0, signal: null, stdout: '', stderr: '' }

for (const [name, script] of [
  ['an open app', 'await connect(url)'],
  ['an app with a call that was answered',
    "const app = await connect(url + '&pool=system'); await app.call('echo', 1, {pool: 'system'})"],
  ['events that nobody waits for', "const app = await connect(url); await app.events('e').ready"],
  ['a stream that is not read',
    "const app = await connect(url); app.stream('x'); globalThis.app = app"],
  ['a block', "const app = await connect(url); await app.block('b', {size: 8, create: true})"],
  ['a lock and a view', `
    const app = await connect(url)
    const block = await app.block('b', {size: 8, create: true})
    globalThis.kept = [await block.lock(), await block.view()]`],
  ['a listener to its state', 'const app = await connect(url); app.onState(() => {})'],
  ['a trigger that does not count', `
    const app = await connect(url); await app.serve('f', () => 1); app.unref()`],
  ['a closed app that served', `
    const app = await connect(url)
    await app.serve('f', () => 1)
    await app.on('e', () => {})
    await app.close()`],
  ['a served trigger that was ended', `
    const app = await connect(url); const f = await app.serve('f', () => 1); await f.close()`],
  ['a trigger of an app that was displaced', `
    const app = await connect(url)
    await app.serve('f', () => 1)
    await connect(url, { takeover: true })`],
  ['an address that is wrong, and a server that is not there', `
    await connect('nonsense').catch(() => {})
    await connect('latzero://x?socket=/nowhere').catch(() => {})`],
  ['a call in flight at process.exit', `
    const app = await connect(url)
    await app.serve('hold', () => { process.exit(0) })
    app.call('hold', null, { to: app.appId })`],
  ['a stream in flight at process.exit', `
    const app = await connect(url)
    await app.serve('hold', async function * () { yield 1; await new Promise(() => {}) })
    const stream = app.stream('hold', null, { to: app.appId })
    await stream.next()
    stream.next()
    process.exit(0)`],
  ['a version that is being written at process.exit', `
    const app = await connect(url)
    const block = await app.block('b', {size: 8, create: true})
    await block.write((array) => { array.fill(9); process.exit(0) })`]
]) {
  test(`a process ends by itself with ${name}`, async () => {
    assert.deepEqual(await run(script), quiet)
  })
}

for (const [name, hold] of [
  ['a served trigger', "await app.serve('f', () => 1)"],
  ['a subscription', "await app.on('e', () => {})"],
  ['an event that is waited for', "app.events('e').next()"],
  ['a call', "await app.serve('hold', () => new Promise(() => {})); " +
    "app.call('hold', 1, { to: 'script', timeoutMs: 60_000 }); app.unref(); app.ref()"],
  ['`ref`', 'app.ref()']
]) {
  test(`a process lives on for ${name}, and SIGINT ends it`, async () => {
    // It would end before the second line, if nothing held it.
    const beat = "setTimeout(() => console.log('alive'), 200).unref()"
    const script = `const app = await connect(url); ${hold}; ${beat};`
    const ended = await run(script, {
      onLine: (text, child) => { if (text.includes('alive')) child.kill('SIGINT') }
    })
    assert.deepEqual([ended.stdout, ended.signal], ['alive\n', 'SIGINT'])
  })
}

test('an exception ends the process with an app that serves', async () => {
  const { status, stderr } = await run(`
    const app = await connect(url)
    await app.serve('f', () => 1)
    throw new Error('mine')`)
  assert.equal(status, 1)
  assert.match(stderr, /Error: mine/)
})

test('an error of a call that nobody caught names its caller', async () => {
  const { status, stderr } = await run("const app = await connect(url); await app.call('nobody')")
  assert.equal(status, 1)
  assert.match(stderr, /UnavailableError: no app serves trigger 'nobody'/)
  assert.match(stderr, /\[eval1\]/)
})

test('a handler that is interrupted ends with its process', async (t) => {
  const app = await place.app(t, 'calls')
  const inside = promised()
  const handler = run(`
    const app = await connect(url)
    await app.serve('hold', () => { console.log('inside'); return new Promise(() => {}) })
    console.log('ready')`, {
    url: place.server.url('holds'),
    onLine: (text, child) => {
      if (text === 'ready\n') inside.resolve(child)
      if (text.includes('inside')) child.kill('SIGINT')
    }
  })
  await inside.promise
  await assert.rejects(app.call('hold', null, { to: 'holds' }), { code: 'handler_gone' })
  assert.equal((await handler).signal, 'SIGINT')
})

test('an emit that nobody waits for is sent before the process ends', async (t) => {
  const app = await place.app(t, 'listens')
  const events = app.events('bye')
  await events.ready
  const next = events.next()
  assert.deepEqual(await run("const app = await connect(url); app.emit('bye', 7)"), quiet)
  assert.equal((await next).value.data, 7)
})

test('without an address the script is the app', async () => {
  const env = { ...process.env, LATZERO_DATA_DIR: place.server.dataDir }
  delete env.LATZERO_URL
  const child = spawn(process.execPath, ['-e', `
    const { connect } = require('latzero')
    connect().then((app) => console.log(app.appId === 'node-' + process.pid, app))`],
  { cwd: here, env, stdio: ['ignore', 'pipe', 'inherit'] })
  let text = ''
  child.stdout.on('data', (data) => { text += data })
  await once(child, 'close')
  assert.match(text, /^true App 'node-[0-9]+' in \[default\], connected\n$/)
})

test('each worker thread has a connection of its own', async () => {
  const worker = `
    const { connect } = require('latzero')
    const { parentPort, workerData } = require('node:worker_threads')
    const { url, handle } = workerData
    connect(url).then(async (app) => {
      const shared = await app.block(handle)
      const [n] = await shared.read()
      parentPort.postMessage(await app.call('double', n, { to: 'script' }))
      await app.serve('open', () => 1)
      const block = await app.block('w', { size: 8, create: true })
      globalThis.kept = [app.call('hold', 1, { to: 'script' }), app.events('e'), block]
    })`
  assert.deepEqual(await run(`
    import { Worker } from 'node:worker_threads'
    const app = await connect(url)
    await app.serve('double', (n) => 2 * n)
    await app.serve('hold', () => new Promise(() => {}))
    const numbers = await app.block('numbers', { shape: 1, dtype: 'u4', create: true })
    await numbers.write((a) => { a[0] = 4 })
    const { handle } = numbers
    const source = ${JSON.stringify(worker)}
    const workers = Array.from({ length: 4 }, (_, i) =>
      new Worker(source, {
        eval: true, execArgv: [], workerData: { handle, url: url.replace('script', 'worker-' + i) }
      }))
    await Promise.all(workers.map((worker) => new Promise((resolve, reject) => {
      worker.on('message', (n) => n === 8 ? resolve() : reject(new Error(String(n))))
      worker.on('error', reject)
    })))
    // They serve, so they live on until they are ended.
    for (const worker of workers) await worker.terminate()
    await app.close()`), quiet)
})

// `CALLS=1000000 node --test test/processes.test.mjs` makes more of them.
const CALLS = Number(process.env.CALLS ?? 100_000)

test(`${CALLS} calls keep memory and descriptors flat`, { timeout: 600_000 }, async (t) => {
  const ended = await run(`
    import { readdirSync } from 'node:fs'
    const app = await connect(url)
    await app.serve('double', ({ n }) => ({ n: 2 * n, text: 'x'.repeat(100) }))
    async function round (count) {
      for (let i = 0; i < count; i += 100) {
        const calls = Array.from({ length: 100 }, (_, n) =>
          app.call('double', { n }, { to: 'script' }))
        for (const [n, answer] of (await Promise.all(calls)).entries()) {
          if (answer.n !== 2 * n) throw new Error('wrong')
        }
      }
      globalThis.gc()
      return { rss: process.memoryUsage().rss, fds: readdirSync('/proc/self/fd').length }
    }
    await round(10_000)
    const before = await round(20_000)
    const after = await round(${CALLS})
    console.log(JSON.stringify({ before, after }))
    if (after.fds > before.fds || after.rss > before.rss + 16e6) {
      throw new Error('they grew')
    }
    await app.close()`, {
    // V8's own memory for new objects would grow.
    args: ['--expose-gc', '--max-semi-space-size=2']
  })
  t.diagnostic(ended.stdout.trim())
  assert.deepEqual({ ...ended, stdout: '' }, quiet)
})

test('nothing is left after close', async () => {
  const resources = () => process.getActiveResourcesInfo().filter((name) => name === 'Timeout')
  const before = resources().length
  const app = await connect(place.server.url('closes'))
  await app.serve('f', () => 1)
  assert.equal(resources().length, before + 1)
  await app.close()
  assert.equal(resources().length, before)
})
