// What reads the socket: Node's event loop, or a thread where that can't be.

import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { test } from 'node:test'

import { connect } from 'latzero'
import { promised, run, withServer } from './helpers.mjs'

const place = withServer()

test('the event loop of Node reads the socket, without a thread', async () => {
  const script = `
    const { readdirSync, readFileSync } = await import('node:fs')
    const threads = () => readdirSync('/proc/self/task').map((id) =>
      readFileSync('/proc/self/task/' + id + '/comm', 'utf8').trim())
    const app = await connect(url)
    await app.serve('double', (n) => 2 * n)
    if (await app.call('double', 4) !== 8) throw new Error('wrong')
    // One that made the connection may just be ending.
    const begin = Date.now()
    while (threads().some((name) => name.startsWith('latzero')) && Date.now() - begin < 2000) {
      await new Promise((resolve) => setTimeout(resolve, 10))
    }
    console.log(threads().filter((name) => name.startsWith('latzero')).length)
    await app.close()`
  const like = (runtime) => {
    const versions = JSON.stringify({ ...process.versions, [runtime]: '1.0.0' })
    return `Object.defineProperty(process, 'versions', { value: ${versions} });`
  }
  for (const [driver, begin, threads] of [
    ['loop', '', '0\n'], ['thread', '', '1\n'], ['', like('bun'), '1\n'], ['', like('deno'), '1\n']
  ]) {
    const env = { LATZERO_NODE_DRIVER: driver }
    const ended = await run(place.server.url('drives'), begin + script, { env })
    assert.deepEqual(ended, { status: 0, signal: null, stdout: threads, stderr: '' })
  }
})

test('a busy event loop delays its app and loses nothing', async (t) => {
  const [serves, calls] = await place.pair(t)
  await serves.serve('double', (n) => 2 * n)
  const answers = Array.from({ length: 500 }, (_, n) => calls.call('double', n))
  for (let i = 0; i < 5; i++) {
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 50)
    await new Promise((resolve) => setImmediate(resolve))
  }
  assert.deepEqual(await Promise.all(answers), Array.from({ length: 500 }, (_, n) => 2 * n))
})

// Older versions of Node do not count.
const counts = performance.nodeTiming.uvMetricsInfo !== undefined

test('an app that has ended wakes nobody', { skip: !counts }, async (t) => {
  const url = place.server.url('displaced')
  const app = await connect(url)
  const block = await app.block('kept', { size: 8, create: true })
  const over = promised()
  app.onState((state) => { if (state === 'displaced') over.resolve() })
  const other = await connect(url, { takeover: true })
  t.after(() => Promise.all([app, other].map((app) => app.close())))
  await over.promise
  // Each would have something to send.
  block.close()
  for (const act of [() => app.call('nobody'), () => app.emit('nobody'), () => app.ping()]) {
    await assert.rejects(act(), { code: 'app_in_use' })
  }
  // Nothing but the timer is under way. A socket that is readable for ever would wake the event
  // loop thousands of times until then.
  const turns = () => performance.nodeTiming.uvMetricsInfo.loopCount
  const before = turns()
  await new Promise((resolve) => setTimeout(resolve, 200))
  assert.ok(turns() - before < 100, `${turns() - before} turns of the event loop`)
})

test('a busy thread keeps no requests that were cancelled', async (t) => {
  const script = `
    const { execFileSync } = await import('node:child_process')
    const app = await connect(url)
    let runs = 0
    await app.serve('take', () => { runs++ })
    const before = process.memoryUsage().rss
    execFileSync(process.execPath, ['--input-type=module', '--eval', process.argv[2]])
    const grown = process.memoryUsage().rss - before
    await app.ping()
    console.log(grown < 50e6 ? 'small' : grown, runs)
    await app.close()`
  const caller = `
    import { connect } from 'latzero'
    const app = await connect(${JSON.stringify(place.server.url('cancels'))})
    for (let i = 0; i < 1000; i++) {
      const controller = new AbortController()
      const call = app.call('take', Buffer.alloc(200_000), { signal: controller.signal })
      call.catch(() => {})
      await app.ping()
      controller.abort()
    }
    await app.close()`
  const env = { LATZERO_NODE_DRIVER: 'thread' }
  const ended = await run(place.server.url('takes'), script, { env, rest: [caller] })
  assert.deepEqual(ended, { status: 0, signal: null, stdout: 'small 0\n', stderr: '' })
})

test('a trigger that is served when its app ends does not keep the process alive', async () => {
  // Both the server's answer and the end of the app come while the thread is busy.
  const script = `
    setTimeout(() => process.exit(5), 20_000).unref()
    const { execFileSync } = await import('node:child_process')
    const app = await connect(url, { reconnect: false })
    const serving = app.serve('f', () => 1)
    execFileSync(process.execPath, ['--input-type=module', '--eval', process.argv[2]])
    await serving`
  const url = place.server.url('served')
  const other = `
    import { connect } from 'latzero'
    await (await connect(${JSON.stringify(url)}, { takeover: true })).close()`
  const env = { LATZERO_NODE_DRIVER: 'thread' }
  const ended = await run(url, script, { env, rest: [other] })
  assert.deepEqual(ended, { status: 0, signal: null, stdout: '', stderr: '' })
})

test('messages larger than a socket takes are sent and received', async (t) => {
  const [serves, calls] = await place.pair(t)
  await serves.serve('echo', (data) => data)
  // Under way at a time they would be more than the server holds for one app.
  for (const size of [3 << 20, 1 << 20, 8 << 20]) {
    const bytes = Buffer.alloc(size, 'latzero')
    assert.ok(bytes.equals(await calls.call('echo', bytes)))
  }
  const text = 'x'.repeat(1 << 20)
  const texts = await Promise.all(Array.from({ length: 4 }, () => calls.call('echo', text)))
  assert.ok(texts.every((other) => other === text))
})

test('everything works with a thread too', { timeout: 300_000 }, () => {
  if (process.env.LATZERO_NODE_DRIVER === 'thread') return
  const env = { ...process.env, LATZERO_NODE_DRIVER: 'thread' }
  delete env.NODE_TEST_CONTEXT
  const files = ['blocks', 'calls', 'documents', 'drivers', 'exits', 'processes', 'security']
  const paths = files.map((name) => fileURLToPath(new URL(`${name}.test.mjs`, import.meta.url)))
  // What takes long does not depend on it.
  const pattern = '^(?!many|100,000|everything works)'
  execFileSync(process.execPath, ['--test', '--test-name-pattern', pattern, ...paths], { env })
})
