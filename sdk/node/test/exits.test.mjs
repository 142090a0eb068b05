// The end of a process or a worker thread with everything open, many times. `EXITS=100`
// looks longer.

import assert from 'node:assert/strict'
import { readdirSync } from 'node:fs'
import { test } from 'node:test'
import { Worker } from 'node:worker_threads'

import { run, withServer } from './helpers.mjs'

const place = withServer()

/** How often each. */
const TIMES = Number(process.env.EXITS ?? 20)
const AT_A_TIME = 4
const TIME_MS = 20_000

/** Opens everything that an app can have open; it needs `connect` and `url`. */
const OPEN = `
  const app = await connect(url, { transient: true })
  const to = app.appId
  const never = () => new Promise(() => {})
  await app.serve('hold', never)
  await app.serve('count', async function * () { for (let i = 0; ; i++) yield i })
  await app.on('event', () => {})
  app.events('other').next()
  app.watch('default').next()
  app.onState(() => {})
  const block = await app.block('b-' + to, { size: 1 << 20, create: true })
  const other = await app.block('c-' + to, { size: 1 << 20, create: true })
  const stream = app.stream('count', null, { to })
  await stream.next()
  stream.next()
  const writer = await other.writer()
  const open = [
    app.call('hold', 1, { to }), app.reply('hold', 2, { to }), block.wait(),
    block.changes().next(), block.read(never), writer.write(never), block.write(never)
  ]
  for (const promise of open) promise.catch(() => {})
  globalThis.kept = [app, stream, writer, open, await block.view()]
  for (let i = 0; i < 100; i++) app.emit('event', i).catch(() => {})`

let apps = 0

/** An address of which no earlier app may still be there. */
const address = () => place.server.url(`app-${++apps}`)

/** Runs `act` this often, some at a time. */
async function repeat (times, act) {
  let next = 0
  await Promise.all(Array.from({ length: AT_A_TIME }, async () => {
    while (next < times) await act(next++)
  }))
}

/** A script that ends by itself within the time, or it is killed by another signal. */
const bounded = (script) => `
  setTimeout(() => process.kill(process.pid, 'SIGABRT'), ${TIME_MS}).unref()
  ${OPEN}
  ${script}`

for (const [name, script, expected] of [
  ['process.exit', 'process.exit(0)', { status: 0 }],
  ['nothing that holds it', 'app.unref()', { status: 0 }],
  ['an exception', "setImmediate(() => { throw new Error('mine') })", { status: 1, error: /mine/ }],
  ['process.exit in a handler', `
    await app.serve('last', () => process.exit(3))
    app.call('last', null, { to })`, { status: 3 }],
  ['an exception in a listener', `
    await app.on('last', () => setImmediate(() => { throw new Error('mine') }))
    app.emit('last')`, { status: 1, error: /mine/ }],
  ['SIGINT', "console.log('open')", { signal: 'SIGINT' }],
  ['SIGINT in a handler', `
    await app.serve('last', () => { console.log('open'); for (;;); })
    app.call('last', null, { to })`, { signal: 'SIGINT' }],
  // That waits five seconds for the handlers, which never end.
  ['closing', 'await app.close().catch(() => {})', { status: 0, times: AT_A_TIME }]
]) {
  test(`a process with everything open ends by ${name}`, { timeout: 600_000 }, async () => {
    const { status = null, signal = null, error, times = TIMES } = expected
    await repeat(times, async () => {
      const ended = await run(address(), bounded(script), {
        onLine: (text, child) => { if (text === 'open\n') child.kill('SIGINT') }
      })
      assert.deepEqual([ended.status, ended.signal], [status, signal], ended.stderr)
      if (error === undefined) assert.equal(ended.stderr, '')
      else assert.match(ended.stderr, error)
    })
  })
}

test('worker threads with everything open are terminated', { timeout: 600_000 }, async () => {
  const source = `
    const { connect } = require('latzero')
    const { parentPort, workerData: url } = require('node:worker_threads')
    const main = async () => { ${OPEN}; parentPort.postMessage('open') }
    main()`
  const round = (times) => repeat(times, async (i) => {
    const thread = new Worker(source, { eval: true, execArgv: [], workerData: address() })
    const failed = new Promise((resolve, reject) => thread.once('error', reject))
    // Every other one at any time, for example while it connects.
    const soon = new Promise((resolve) => setTimeout(resolve, 4 * i % 97))
    const open = new Promise((resolve) => thread.once('message', resolve))
    await Promise.race([failed, i % 2 === 0 ? open : soon])
    // 0 if it had not begun.
    assert.ok([0, 1].includes(await thread.terminate()))
  })
  const count = (what) => readdirSync(`/proc/self/${what}`).length
  await round(AT_A_TIME)
  const before = [count('task'), count('fd')]
  await round(TIMES)
  // Threads of the client end soon after their environment.
  const begin = Date.now()
  while (count('task') > before[0] && Date.now() - begin < TIME_MS) {
    await new Promise((resolve) => setTimeout(resolve, 10))
  }
  assert.ok(count('task') <= before[0], `${count('task')} threads, ${before[0]} before`)
  assert.ok(count('fd') <= before[1] + 2 * AT_A_TIME, `${count('fd')} files, ${before[1]} before`)
})
