// Calls, errors, streams, events, presence and parked calls against a real server.

import assert from 'node:assert/strict'
import { getEventListeners } from 'node:events'
import { createRequire } from 'node:module'
import { totalmem } from 'node:os'
import { test } from 'node:test'

import * as latzero from 'latzero'
import { server } from 'latzero/testing'
import { all, collectUntil, promised, withServer } from './helpers.mjs'

const { BadRequestError, CancelledError, DisconnectedError, Failure, ForbiddenError } = latzero
const { HandlerFailedError, LatZeroError, TimeoutError, UnavailableError, connect } = latzero
const addon = createRequire(import.meta.url)('../lib/addon.cjs').load()
const place = withServer()

test('a call is answered', async (t) => {
  const [serves, calls] = await place.pair(t)
  await serves.serve('double', ({ n }) => n * 2)
  assert.equal(await calls.call('double', { n: 21 }), 42)
  await serves.serve('later', async ({ n }) => n + 1)
  const reply = await calls.reply('later', { n: 1 }, { timeoutMs: 5000, to: serves.appId })
  assert.deepEqual(reply, { data: 2, headers: {} })
  const to = { appId: serves.appId, instance: serves.instance }
  assert.equal(await calls.call('double', { n: 1 }, { to }), 2)
})

test('a handler says what it takes', async (t) => {
  const [serves, calls, pool] = await place.pair(t)
  const schema = { type: 'object', properties: { n: { type: 'integer' } }, required: ['n'] }
  await serves.serve('double', ({ n }) => n * 2, { schema })
  assert.deepEqual((await calls.trigger(pool, 'double')).schema, schema)
  await serves.serve('plain', () => 1)
  assert.ok(!('schema' in await calls.trigger(pool, 'plain')))
  assert.equal(await calls.trigger(pool, 'none'), null)
  const large = { title: 'n'.repeat(5000) }
  await assert.rejects(serves.serve('large', () => 1, { schema: large }), BadRequestError)
})

test('the built-in app answers', async (t) => {
  const app = await place.app(t, 'me', 'system')
  assert.deepEqual(await app.call('echo', { a: [1, 'ä'] }), { a: [1, 'ä'] })
  assert.ok(await app.ping() < 10_000)
  const { apps } = await app.apps()
  assert.ok(apps.some(({ app_id: id, live }) => id === 'me' && live))
  assert.ok(JSON.stringify(await app.pools()).includes('"system"'))
  const listed = await app.request({ action: 'app_list' })
  assert.deepEqual(listed.apps.map((app) => app.app_id), apps.map((app) => app.app_id))
  assert.match(app.instance, /^[0-9a-f]{16}$/)
  assert.deepEqual([app.appId, app.isConnected, app.isStored], ['me', true, true])
})

test('a handler sees its request', async (t) => {
  const [serves, calls, pool] = await place.pair(t)
  const seen = []
  await serves.serve('who', (data, request) => {
    seen.push(request)
    const { name, headers, key, attempt, isEmit, cancelled, origin } = request
    assert.equal(request.app, serves)
    assert.ok(request.timeLeftMs > 1000 && request.timeLeftMs <= 20_000)
    return { name, pool: request.pool, headers, key, attempt, isEmit, cancelled, ...origin }
  })
  const given = { headers: { a: 'b' }, key: 'k', timeoutMs: 20_000 }
  assert.deepEqual(await calls.call('who', null, given), {
    name: 'who', pool, headers: { a: 'b' }, key: 'k', attempt: 1, isEmit: false, cancelled: false,
    appId: calls.appId, instance: calls.instance
  })
  assert.deepEqual(seen[0].headers, { a: 'b' })
})

test('what a handler throws is told', async (t) => {
  const [serves, calls] = await place.pair(t)
  await serves.serve('divide', function divide ({ a, b }) {
    if (a === 0) throw new Failure('zero', 'nothing to divide', { a })
    if (b === 0) throw new RangeError('b is zero')
    return a / b
  })
  const error = await calls.call('divide', { a: 1, b: 0 }).catch((error) => error)
  assert.ok(error instanceof HandlerFailedError && error instanceof LatZeroError)
  assert.deepEqual([error.code, error.type, error.ran], ['handler_error', 'RangeError', null])
  assert.match(error.remoteTraceback, /RangeError: b is zero\n.*divide/s)
  assert.equal(error.cause.stack, error.remoteTraceback)
  // The stack says who called.
  assert.match(error.stack, /calls\.test\.mjs/)
  const own = await calls.call('divide', { a: 0, b: 1 }).catch((error) => error)
  assert.ok(own instanceof HandlerFailedError)
  assert.deepEqual([own.code, own.message, own.data], ['zero', 'nothing to divide', { a: 0 }])
  assert.equal(own.cause, undefined)
})

test('tracebacks may be left out, and are bounded', async (t) => {
  const [serves, calls] = await place.pair(t, { tracebacks: false })
  await serves.serve('fails', () => { throw new TypeError('x') })
  const error = await calls.call('fails').catch((error) => error)
  assert.deepEqual(error.data, { type: 'TypeError', message: 'x' })
  const [loud, asks] = await place.pair(t)
  await loud.serve('fails', () => {
    const error = new Error('long')
    error.stack = 'x'.repeat(100_000)
    throw error
  })
  assert.equal((await asks.call('fails').catch((e) => e)).remoteTraceback.length, 16 * 1024)
})

test('handlers may throw anything', async (t) => {
  const [serves, calls] = await place.pair(t)
  const values = [undefined, null, 'text', 5, Symbol('s'), { toString () { throw new Error() } },
    Object.create(null), Object.assign(new Error('m'), { constructor: undefined })]
  await serves.serve('fails', (i) => { throw values[i] })
  for (const i of values.keys()) {
    await assert.rejects(calls.call('fails', i), HandlerFailedError)
  }
  await serves.serve('odd', () => { throw new Failure('odd', 'm', { a: 2n ** 80n }) })
  await assert.rejects(calls.call('odd'), { code: 'odd', message: /its data can't be sent/ })
  await serves.serve('answers', () => () => {})
  await assert.rejects(calls.call('answers'), { code: 'handler_error', type: 'TypeError' })
})

test('an answer that cannot be sent is a failure of the handler', async (t) => {
  const [serves, calls] = await place.pair(t)
  await serves.serve('answers', () => ({ v: [new Uint8Array(1)] }))
  await serves.serve('streams', async function * () {
    yield { v: [new Uint8Array(1)] }
  })
  const fails = { name: 'HandlerFailedError', code: 'handler_error', type: 'TypeError' }
  const why = /the answer can't be sent: data\.v\[0\]/
  for (const call of [() => calls.call('answers'), () => all(calls.stream('streams'))]) {
    await assert.rejects(call, { ...fails, message: why })
  }
})

test("the error of a handler's own call is thrown like any other", async (t) => {
  const [serves, calls] = await place.pair(t)
  await serves.serve('late', () => serves.call('nothing'))
  await assert.rejects(calls.call('late'), {
    name: 'HandlerFailedError', code: 'handler_error', type: 'UnavailableError'
  })
  await serves.serve('passes_on', () => serves.call('nothing').catch((error) => {
    throw new Failure(error.code, error.message)
  }))
  await assert.rejects(calls.call('passes_on'), { name: 'UnavailableError', code: 'no_handler' })
})

test('errors have their families', async (t) => {
  const [, calls] = await place.pair(t)
  const error = await calls.call('nobody').catch((error) => error)
  assert.ok(error instanceof UnavailableError)
  assert.deepEqual([error.code, error.ran, error.retryable], ['no_handler', 'no', true])
  assert.ok(error.hint.length > 0 && error.name === 'UnavailableError')
  const codes = addon.codes()
  assert.ok(codes.length > 30)
  for (const [, family] of codes) {
    assert.ok(latzero[`${family}Error`].prototype instanceof LatZeroError)
  }
  // Those of this side say the same as those of the server.
  const local = await calls.call('x', [Buffer.from('x')]).catch((error) => error)
  const remote = await calls.request({ action: 5 }).catch((error) => error)
  for (const { code, hint } of [local, remote]) {
    assert.deepEqual([code, hint], ['bad_message', 'Fix what the message names.'])
  }
  await assert.rejects(calls.call('in valid'), { name: 'BadRequestError' })
  await assert.rejects(calls.join('bad pool'), BadRequestError)
  await assert.rejects(calls.call('x', 1, { pool: 'not-joined' }), ForbiddenError)
})

test('mistakes in options are found before anything is sent', async (t) => {
  const app = await place.app(t)
  await assert.rejects(app.call('x', {}, { timeout: 5 }), /no option 'timeout'/)
  for (const timeoutMs of [-1, NaN, Infinity, '5', 1n]) {
    await assert.rejects(app.call('x', {}, { timeoutMs }), TypeError)
  }
  await assert.rejects(app.call('x', {}, { headers: { a: 1 } }), TypeError)
  const wrong = [
    ...[NaN, -1, 1.5, 0, 2 ** 40, '2'].map((attempts) => ({ attempts })),
    ...[NaN, -1, 1.5, 1e300].map((window) => ({ window })),
    ...[-1, 1e300].map((timeoutMs) => ({ timeoutMs })),
    ...[{}, null, 5, { appId: 'a' }].map((to) => ({ to })),
    ...[new Map([['a', 'b']]), [], null, new Headers(), { a: 1 }].map((headers) => ({ headers })),
    { pool: null }, { key: 5 }, { id: {} }, { redeliver: 1 }, { privileged: 'no' }, { signal: {} }
  ]
  for (const given of wrong) {
    const [name] = Object.keys(given)
    const expected = { name: 'TypeError', message: new RegExp(`^${name} is .*, not `) }
    assert.throws(() => app.stream('x', {}, given), expected)
  }
  for (const call of [
    () => app.serve('x', () => 1, { concurrency: NaN }), () => app.serve('x', () => 1, { doc: 1 }),
    () => app.serve('x', () => 1, { pools: 'a' }), () => app.emit('x', 1, { count: 1 }),
    () => app.emit('x', 1, { headers: [] }), () => app.block('x', { slots: 1.5, size: 1 }),
    () => app.block('x', { write: 1 }), () => connect(place.server.url('x'), { strict: 'no' }),
    () => connect(place.server.url('x'), { bigint: 'false' }),
    () => connect(place.server.url('x'), { tracebacks: 0 }),
    () => connect(`latzero://x@${place.server.address}`, { connectTimeoutMs: 0 })
  ]) {
    await assert.rejects(call(), { name: 'TypeError', message: /^\w+ is .*, not / })
  }
  for (const given of [5, () => 1, 'x', [1]]) {
    await assert.rejects(app.call('x', 1, given), { message: 'options are an object' })
  }
  await assert.rejects(app.call('x', 1, { sginal: 1 }), /there are timeoutMs, .*, signal/)
  // Those that an object inherits count, too.
  class Given { get headers () { return 5 } }
  await assert.rejects(app.call('x', 1, new Given()), /^TypeError: headers is/)
  await assert.rejects(app.call('x', 1, Object.create({ timeoutMs: NaN })), TypeError)
  const headers = Object.assign(Object.create(null), { a: 'b' })
  await assert.rejects(app.call('x', 1, { headers }), { code: 'no_handler' })
  await assert.rejects(app.call('x', {}, { signal: {} }), TypeError)
  await assert.rejects(app.call(5), TypeError)
  await assert.rejects(app.serve('x', 5), TypeError)
  await assert.rejects(app.serve('x', () => {}, { strategy: 'none' }), TypeError)
  await assert.rejects(app.on('x'), TypeError)
  await assert.rejects(connect(place.server.url('x'), { nonsense: 1 }), TypeError)
  await assert.rejects(connect('nonsense'), { name: 'BadRequestError' })
  await assert.rejects(connect('latzero://x?socket=/nowhere/at/all'), DisconnectedError)
  assert.throws(() => new app.constructor(), TypeError)
})

test('a call times out', async (t) => {
  const [serves, calls] = await place.pair(t)
  const { promise, resolve } = promised()
  await serves.serve('slow', () => promise)
  const error = await calls.call('slow', null, { timeoutMs: 50 }).catch((error) => error)
  assert.ok(error instanceof TimeoutError)
  resolve()
})

test('a signal cancels a call, and its handler hears of it', async (t) => {
  const [serves, calls] = await place.pair(t)
  const inside = promised()
  const cancelled = promised()
  await serves.serve('hold', (data, { signal }) => new Promise((resolve) => {
    inside.resolve()
    signal.addEventListener('abort', () => {
      cancelled.resolve(signal.reason)
      resolve()
    })
  }))
  const controller = new AbortController()
  const call = calls.call('hold', null, { signal: controller.signal })
  await inside.promise
  const reason = new Error('enough')
  controller.abort(reason)
  await assert.rejects(call, reason)
  assert.ok(await cancelled.promise instanceof CancelledError)
  await assert.rejects(calls.call('hold', null, { signal: AbortSignal.abort(reason) }), reason)
  // A signal that fires after the answer does nothing, and nothing listens to it any more.
  await serves.serve('quick', () => 1)
  const late = new AbortController()
  assert.equal(await calls.call('quick', null, { signal: late.signal }), 1)
  late.abort()
})

test('streams', async (t) => {
  const [serves, calls] = await place.pair(t)
  await serves.serve('count', async function * ({ n }, request) {
    for (let i = 0; i < n; i++) yield i
    await request.progress({ at: 1.5 })
    yield n
    return 'done'
  })
  const stream = calls.stream('count', { n: 300 }, { window: 4 })
  assert.deepEqual(await all(stream), [...Array(301).keys()])
  assert.deepEqual([stream.end, stream.progress], ['done', { at: 1.5 }])
  assert.deepEqual(await stream.next(), { done: true, value: undefined })
  // Several at a time come in order.
  const other = calls.stream('count', { n: 3 })
  const steps = await Promise.all([other.next(), other.next(), other.next()])
  assert.deepEqual(steps.map(({ value }) => value), [0, 1, 2])
  await other.return()
  // Plain generators, and bytes as items.
  await serves.serve('plain', function * () { yield Buffer.from([0, 255]) })
  assert.deepEqual(await all(calls.stream('plain')), [Buffer.from([0, 255])])
  await serves.serve('fails', async function * () {
    yield 1
    throw new Failure('stop', 'here')
  })
  const items = []
  await assert.rejects(async () => {
    for await (const item of calls.stream('fails')) items.push(item)
  }, { code: 'stop' })
  assert.deepEqual(items, [1])
  // A call without items is a stream that only has an end.
  await serves.serve('one', () => 7)
  const empty = calls.stream('one')
  assert.deepEqual([await all(empty), empty.end], [[], 7])
})

test('iterators of all kinds are streamed', async (t) => {
  const [serves, calls] = await place.pair(t)
  await serves.serve('promises', function * () {
    yield Promise.resolve(5)
    yield * [6, Promise.resolve(7)]
    return Promise.resolve('end')
  })
  const stream = calls.stream('promises')
  assert.deepEqual([await all(stream), stream.end], [[5, 6, 7], 'end'])
  await serves.serve('rejects', function * () { yield Promise.reject(new RangeError('x')) })
  await assert.rejects(all(calls.stream('rejects')), { type: 'RangeError' })
  for (const what of [undefined, 5, null]) {
    const iterator = { next: async () => what, [Symbol.asyncIterator]: () => iterator }
    await serves.serve('wrong', () => iterator)
    await assert.rejects(all(calls.stream('wrong')), { type: 'TypeError' })
  }
})

test('a handler may take functions out of its request', async (t) => {
  const [serves, calls] = await place.pair(t)
  await serves.serve('reports', async (data, { block, progress }) => {
    await progress(0.5)
    return block('lent').nbytes
  })
  const lent = await calls.block('lent', { size: 8, create: true })
  const stream = calls.stream('reports', { lent })
  assert.deepEqual([await all(stream), stream.progress, stream.end], [[], 0.5, 8])
})

test('what fails when a stream is closed is a warning', async (t) => {
  const [serves, calls] = await place.pair(t)
  const throws = () => { throw new Error('mine') }
  const iterators = {
    * generator () { try { for (;;) yield 1 } finally { throws() } },
    async * later () { try { for (;;) yield 1 } finally { throws() } },
    object: () => ({
      next: async () => ({ done: false, value: 1 }),
      return: throws,
      [Symbol.asyncIterator] () { return this }
    })
  }
  for (const [name, handler] of Object.entries(iterators)) {
    await serves.serve(name, handler)
    const warned = new Promise((resolve) => process.once('warning', resolve))
    for await (const _ of calls.stream(name)) break
    const { message, detail } = await warned
    assert.match(message, new RegExp(`'${name}' failed when its stream was closed`))
    assert.match(detail, /mine/)
  }
})

test('the newest report stays when a stream has ended', async (t) => {
  const [serves, calls] = await place.pair(t)
  await serves.serve('reports', async (data, request) => {
    for (let i = 1; i <= 100; i++) await request.progress(i)
    return 'end'
  })
  const stream = calls.stream('reports')
  assert.deepEqual([await all(stream), stream.progress, stream.end], [[], 100, 'end'])
  await serves.serve('lone', (data, request) => request.progress('\ud800'))
  await assert.rejects(all(calls.stream('lone')), { type: 'BadRequestError' })
})

test('one signal may be for many calls', async (t) => {
  const [serves, calls] = await place.pair(t)
  await serves.serve('wait', () => new Promise(() => {}))
  const warnings = []
  const warned = ({ name }) => warnings.push(name)
  process.on('warning', warned)
  t.after(() => process.removeListener('warning', warned))
  const controller = new AbortController()
  const { signal } = controller
  const waits = Array.from({ length: 20 }, () => calls.call('wait', null, { signal }))
  const streams = Array.from({ length: 20 }, () => calls.stream('wait', null, { signal }).next())
  await calls.ping()
  controller.abort()
  for (const one of await Promise.allSettled([...waits, ...streams])) {
    assert.equal(one.reason?.name, 'AbortError')
  }
  await new Promise((resolve) => setImmediate(resolve))
  assert.deepEqual(warnings, [])
})

test('whatever a handler throws is answered', async (t) => {
  const [serves, calls] = await place.pair(t)
  const hidden = () => { throw new Error('hidden') }
  const withGetter = (name) => Object.defineProperty(new RangeError('x'), name, { get: hidden })
  const revoked = Proxy.revocable({}, {})
  revoked.revoke()
  const things = [
    withGetter('stack'), withGetter('message'), withGetter('constructor'),
    Object.assign(new Error('x'), { message: Symbol('s'), name: Symbol('n') }), revoked.proxy,
    Object.create(null), Symbol('s'), { toString: hidden }, undefined, null, 5
  ]
  await serves.serve('throws', (n) => { throw things[n] })
  await serves.serve('streams', function * (n) { throw things[n] })
  for (const n of things.keys()) {
    for (const name of ['throws', 'streams']) {
      await assert.rejects(calls.call(name, n), { code: 'handler_error', ran: null })
    }
  }
  await assert.rejects(calls.call('throws', 0), { type: 'RangeError', message: 'RangeError: x' })
  await serves.serve('own', () => {
    throw new Failure('own', 'x', { toJSON: () => { throw revoked.proxy } })
  })
  await assert.rejects(calls.call('own'), { code: 'own', message: /^x \(its data can't be sent/ })
  const before = Error.prepareStackTrace
  await serves.serve('trace', () => {
    Error.prepareStackTrace = hidden
    throw new TypeError('x')
  })
  try {
    await assert.rejects(calls.call('trace'), { type: 'TypeError' })
  } finally {
    Error.prepareStackTrace = before
  }
  // Of an emit it is a warning.
  const warned = promised()
  const listen = ({ message }) => { if (message.includes("'throws'")) warned.resolve() }
  process.on('warning', listen)
  t.after(() => process.removeListener('warning', listen))
  await calls.emit('throws', 4)
  await warned.promise
})

test('what is too large for a stream fails it', async (t) => {
  const [serves, calls] = await place.pair(t)
  const huge = 'x'.repeat(17 * 1024 * 1024)
  let closed = 0
  await serves.serve('huge', async function * (data, request) {
    try {
      yield 1
      if (data === 'item') yield huge
      await request.progress(huge)
      yield 2
    } finally {
      closed++
    }
  })
  for (const what of ['item', 'report']) {
    const stream = calls.stream('huge', what)
    assert.equal((await stream.next()).value, 1)
    await assert.rejects(stream.next(), { code: 'handler_error', type: 'BadRequestError' })
  }
  assert.equal(closed, 2)
  // A function may go on without the report.
  await serves.serve('goes-on', (data, request) => request.progress(huge).catch(({ code }) => code))
  assert.equal(await calls.call('goes-on'), 'too_large')
})

test('a stream is not read ahead of its window', async (t) => {
  const [serves, calls] = await place.pair(t)
  let made = 0
  await serves.serve('count', function * () { while (true) yield made++ })
  const stream = calls.stream('count', null, { window: 4 })
  await stream.next()
  // Whatever is under way has arrived before these answers.
  for (let i = 0; i < 5; i++) await Promise.all([serves.ping(), calls.ping()])
  assert.ok(made <= 7, `${made} were made`)
  await stream.return()
})

for (const [name, leave] of [
  ['break', async (stream) => { for await (const _ of stream) break }],
  ['return', async (stream) => { await stream.next(); await stream.return() }],
  ['cancel while it waits', async (stream) => {
    await stream.next()
    const next = stream.next()
    stream.cancel()
    assert.deepEqual(await next, { done: true, value: undefined })
  }],
  ['a signal', async (stream, controller) => {
    await stream.next()
    const next = stream.next()
    controller.abort(new Error('left'))
    await assert.rejects(next, /left/)
  }],
  ['a signal between two items', async (stream, controller) => {
    await stream.next()
    controller.abort(new Error('left'))
    await assert.rejects(stream.next(), /left/)
  }]
]) {
  test(`leaving a stream closes its generator: ${name}`, async (t) => {
    const [serves, calls] = await place.pair(t)
    const closed = promised()
    const fired = promised()
    await serves.serve('wait', async function * (data, { signal }) {
      const aborted = new Promise((resolve) => signal.addEventListener('abort', resolve))
      try {
        yield 1
        await aborted
        fired.resolve()
        yield 2
      } finally {
        closed.resolve()
      }
    })
    const controller = new AbortController()
    await leave(calls.stream('wait', null, { signal: controller.signal }), controller)
    await closed.promise
    await fired.promise
  })
}

test('emits reach listeners', async (t) => {
  const [listens, emits, pool] = await place.pair(t)
  const events = listens.events('done')
  await events.ready
  assert.equal(await emits.emit('done', { n: 1 }, { count: true, headers: { h: '1' } }), 1)
  const { value } = await events.next()
  assert.deepEqual(value, {
    name: 'done', pool, data: { n: 1 }, lost: 0, headers: { h: '1' },
    origin: { appId: emits.appId, instance: emits.instance }
  })
  const seen = promised()
  const told = await listens.on('told', (event) => seen.resolve(event.data))
  assert.equal(await emits.emit('told', Buffer.from('raw')), undefined)
  assert.deepEqual(await seen.promise, Buffer.from('raw'))
  await told.close()
  // Ending a wait, and asking after the end.
  const waits = events.next()
  await events.return()
  assert.deepEqual(await waits, { done: true, value: undefined })
  assert.deepEqual(await events.next(), { done: true, value: undefined })
  await listens.ping()
  assert.equal(await emits.emit('done', 2, { count: true }), 0)
})

test('a listener that throws is warned of, and hears the next event', async (t) => {
  const [listens, emits] = await place.pair(t)
  const warned = promised()
  process.once('warning', warned.resolve)
  const second = promised()
  await listens.on('e', (event) => {
    if (event.data === 1) throw new Error('first')
    second.resolve(event.data)
  })
  await emits.emit('e', 1)
  await emits.emit('e', 2)
  assert.equal(await second.promise, 2)
  assert.match((await warned.promise).detail, /first/)
})

test('emits and calls come in the order that they were sent in', async (t) => {
  const [serves, emits] = await place.pair(t)
  const came = []
  await serves.serve('e', (n) => { came.push(n) })
  for (let i = 0; i < 500; i++) {
    if (i % 7 === 0) emits.call('e', i)
    else emits.emit('e', i)
  }
  await emits.call('e', 500)
  assert.deepEqual(came, [...Array(501).keys()])
})

test('a handler of emits has a bounded number of them', async (t) => {
  const [serves, emits] = await place.pair(t)
  const { promise, resolve } = promised()
  let [runs, lost] = [0, 0]
  await serves.serve('e', async (data, request) => {
    runs++
    lost += request.lost
    await promise
  })
  for (let i = 0; i < 2000; i++) await emits.emit('e', i)
  // Those before this call have arrived before it is answered.
  assert.equal(await emits.emit('e', 0, { count: true }), 1)
  await serves.serve('f', () => 1)
  await emits.call('f')
  assert.equal(runs, 1024)
  resolve()
  // All of them have answered when the event loop comes round.
  await new Promise(setImmediate)
  await emits.emit('e', 0)
  await emits.call('f')
  assert.deepEqual([runs, lost], [1025, 2001 - 1024])
})

test('a refused name is an error of `ready` and of the first event', async (t) => {
  const app = await place.app(t)
  await assert.rejects(app.on('not valid', () => {}), BadRequestError)
  const events = app.events('not valid')
  await assert.rejects(events.next(), BadRequestError)
})

test('presence is watched', async (t) => {
  const [, calls, pool] = await place.pair(t)
  const watch = calls.watch(pool)
  await watch.ready
  const comes = await connect(place.server.url('comes', pool))
  const { value } = await watch.next()
  assert.deepEqual([value.event, value.appId, value.pool], ['app_online', 'comes', pool])
  assert.equal(value.instance, comes.instance)
  await comes.close()
  for await (const { event, appId } of watch) {
    if (event === 'app_offline') {
      assert.equal(appId, 'comes')
      break
    }
  }
})

test('parked calls', async (t) => {
  const [serves, calls] = await place.pair(t)
  const parked = await calls.park('bill', { order: 17 }, { id: 'order-17', timeoutMs: 60_000 })
  assert.equal(parked.id, 'order-17')
  await serves.serve('bill', ({ order }) => order + 1)
  assert.equal(await parked.answer(), 18)
  const taken = { name: 'BadRequestError', code: 'bad_message', message: /'order-17' was taken/ }
  await assert.rejects(parked.answer(), taken)
  // Nobody waits for these.
  const done = await calls.park('bill', { order: 1 }, { id: 'order-1' })
  done.leave()
  done.leave()
  await assert.rejects(done.answer(), BadRequestError)
  const answers = calls.answers()
  const first = (await answers.next()).value
  assert.deepEqual([first.id, first.result(), first.lost], ['order-1', 2, 0])
  const refused = await calls.park('refuse', null, { id: 'order-2' })
  refused.leave()
  await serves.serve('refuse', () => { throw new Failure('odd_order') })
  const second = (await answers.next()).value
  assert.equal(second.id, 'order-2')
  assert.throws(() => second.result(), { code: 'odd_order' })
  await answers.return()
  const unwanted = await calls.park('later', null, { id: 'order-3' })
  unwanted.cancel()
  // A wait that ends early may be repeated, until the call is left.
  const left = await calls.park('later', null, { id: 'order-4' })
  const waits = left.answer({ signal: AbortSignal.timeout(1) })
  await assert.rejects(waits, { name: 'TimeoutError' })
  const again = left.answer()
  left.leave()
  await assert.rejects(again, CancelledError)
  await serves.serve('later', () => 'came')
  const [late] = await Promise.all([calls.answers().next()])
  assert.deepEqual([late.value.id, late.value.result()], ['order-4', 'came'])
})

test('a wait for an answer ends at once', async (t) => {
  const [serves, calls] = await place.pair(t)
  const ends = {
    cancelled: (parked) => parked.cancel(),
    left: (parked) => parked.leave(),
    aborted: (parked, abort) => abort()
  }
  let again
  for (const [id, end] of Object.entries(ends)) {
    const parked = await calls.park('later', id, { id })
    const [first, second] = [new AbortController(), new AbortController()]
    const waits = parked.answer({ signal: first.signal })
    await assert.rejects(parked.answer({ signal: second.signal }), /waited for already/)
    end(parked, () => first.abort())
    await assert.rejects(waits, id === 'aborted' ? { name: 'AbortError' } : (error) => {
      assert.ok(error instanceof CancelledError, error.stack)
      return error.code === 'cancelled'
    })
    if (id === 'aborted') {
      again = parked.answer()
    } else {
      await assert.rejects(parked.answer(), BadRequestError)
      parked.cancel()
      parked.leave()
    }
  }
  // Only the one that was cancelled is gone.
  await serves.serve('later', (id) => id)
  const { value } = await calls.answers().next()
  assert.deepEqual([value.result(), await again], ['left', 'aborted'])
})

test('what is waited for ends at once when it is closed', async (t) => {
  const [calls, other, pool] = await place.pair(t)
  const block = await other.block('a', { size: 4, create: true })
  for (const open of [
    () => calls.events('e'), () => calls.watch(pool), () => calls.answers(),
    () => block.changes(), () => calls.stream('nobody-yet')
  ]) {
    for (const isReady of [true, false]) {
      const source = open()
      if (isReady) await source.ready
      const waits = [source.next(), source.next()]
      await source.return()
      for (const one of waits) assert.deepEqual(await one, { done: true, value: undefined })
      assert.equal((await source.next()).done, true)
    }
  }
})

test('what waits for a server that does not answer ends at once when it is closed', async (t) => {
  const local = await server()
  t.after(() => local.close())
  const app = await connect(local.url('alone'))
  await local.kill()
  const events = app.events('e')
  const waits = events.next()
  await events.return()
  assert.deepEqual(await waits, { done: true, value: undefined })
  await app.close()
})

test('a parked call is stored and can be cancelled, also where a handler has it', {
  timeout: 60_000
}, async (t) => {
  const [serves, calls, pool] = await place.pair(t)
  const [inside, gone] = [promised(), promised()]
  await serves.serve('hold', (data, { signal }) => {
    signal.addEventListener('abort', gone.resolve)
    inside.resolve()
    return gone.promise
  })
  // The handler does not answer before this.
  const parked = await calls.park('hold', null, { id: 'held' })
  await inside.promise
  parked.cancel()
  await gone.promise
  // Its caller disconnects, and another instance of the app gets the answer.
  const { promise, resolve } = promised()
  await serves.serve('later', () => promise)
  const before = await connect(place.server.url('leaves', pool))
  await before.park('later', null, { id: 'left' })
  await before.close()
  resolve('came')
  const after = await place.app(t, 'leaves', pool)
  const { value } = await after.answers().next()
  assert.deepEqual([value.id, value.result()], ['left', 'came'])
})

test('a repeated call with an idempotency key runs once', async (t) => {
  const [serves, calls] = await place.pair(t)
  let runs = 0
  await serves.serve('pay', () => ++runs)
  const given = { idempotencyKey: 'k-1' }
  assert.equal(await calls.call('pay', 1, given), 1)
  assert.equal(await calls.call('pay', 1, given), 1)
  assert.equal(await calls.call('pay', 1, { idempotencyKey: 'k-2' }), 2)
})

test('serving ends, and a name may be served anew', async (t) => {
  const [serves, calls] = await place.pair(t)
  const first = await serves.serve('f', () => 1)
  const second = await serves.serve('f', () => 2, { concurrency: 2, doc: 'Two.' })
  assert.equal(await calls.call('f'), 2)
  await first.close()
  assert.equal(await calls.call('f'), 2)
  await second.close()
  await second.close()
  await assert.rejects(calls.call('f'), UnavailableError)
})

test('a function that is served no longer is forgotten', async (t) => {
  const [serves, calls] = await place.pair(t)
  const functions = []
  const serve = () => {
    const f = () => 1
    functions.push(new WeakRef(f))
    return serves.serve('f', f)
  }
  await serve()
  const last = await serve()
  await collectUntil(() => functions[0].deref() === undefined)
  assert.equal(await calls.call('f'), 1)
  await last.close()
  await collectUntil(() => functions[1].deref() === undefined)
})

test('a request that no function is there for fails', async (t) => {
  const [serves, calls] = await place.pair(t)
  await serves.serve('f', () => 1)
  const [internal] = Object.getOwnPropertySymbols(serves)
  serves[internal].triggers.clear()
  await assert.rejects(calls.call('f'), { name: 'UnavailableError', code: 'no_handler' })
})

test('pools are joined and left', async (t) => {
  const app = await place.app(t)
  await app.join('another')
  assert.deepEqual(app.joined.toSorted(), ['another', 'default'])
  await app.leave('another')
  assert.deepEqual(app.joined, ['default'])
})

test('after close everything fails, and closing twice is fine', async () => {
  const app = await connect(place.server.url('closes'))
  const other = await connect(place.server.url('waits'))
  const { promise, resolve } = promised()
  await other.serve('hold', () => promise)
  const call = app.call('hold')
  call.catch(() => {})
  const events = app.events('e')
  await events.ready
  const next = events.next()
  const served = await app.serve('f', () => 1)
  const block = await app.block('a', { size: 4, create: true })
  const lock = await block.lock()
  await Promise.all([app.close(), app.close()])
  await app.close()
  // The server cancels it, or the connection ends before it can say so.
  await assert.rejects(call, LatZeroError)
  assert.deepEqual(await next, { done: true, value: undefined })
  await served.close()
  for (const after of [
    () => app.call('x'), () => app.emit('x'), () => app.serve('x', () => {}), () => app.ping(),
    () => app.events('x').next(), () => app.stream('x').next(), () => app.block('x'),
    () => app.answers().next(), () => app.park('x'), () => block.write(() => {}),
    () => block.wait(), () => block.info(), () => block.changes().next(), () => lock.renew()
  ]) {
    await assert.rejects(async () => after(), (error) => {
      assert.ok(error instanceof DisconnectedError, error.stack)
      return error.code === 'disconnected' && error.ran === 'no'
    })
  }
  assert.deepEqual([app.isConnected, app.instance, app.joined], [false, undefined, []])
  resolve()
  await other.close()
})

test('closing waits for the handlers that run', async (t) => {
  const [serves, calls] = await place.pair(t)
  const inside = promised()
  const { promise, resolve } = promised()
  await serves.serve('hold', async () => {
    inside.resolve()
    await promise
    return 'answered'
  })
  const call = calls.call('hold')
  await inside.promise
  const closing = serves.close()
  resolve()
  assert.equal(await call, 'answered')
  await closing
})

test('another instance takes over', async () => {
  const url = place.server.url('single')
  const first = await connect(url, { exclusive: true })
  await assert.rejects(connect(url, { exclusive: true }), { code: 'app_in_use' })
  const second = await connect(url, { takeover: true })
  assert.notEqual(first.instance, second.instance)
  await first.close()
  await second.close()
})

test('the app reconnects after the server was killed', async (t) => {
  const own = await server()
  t.after(() => own.close())
  const app = await connect(own.url('again'))
  t.after(() => app.close())
  const before = app.instance
  await app.serve('f', () => 1)
  const events = app.events('e')
  await events.ready
  await own.restart()
  assert.equal(await app.call('f', null, { to: 'again', timeoutMs: 20_000 }), 1)
  assert.notEqual(app.instance, before)
  await app.emit('e', 5)
  assert.equal((await events.next()).value.data, 5)
})

test('what was in flight when the server was killed is told so', async (t) => {
  const own = await server()
  t.after(() => own.close())
  const app = await connect(own.url('flies'))
  t.after(() => app.close())
  const inside = promised()
  const gone = promised()
  await app.serve('hold', (data, { signal }) => {
    signal.addEventListener('abort', gone.resolve)
    inside.resolve()
    return new Promise(() => {})
  })
  const call = app.call('hold', null, { to: 'flies' })
  await inside.promise
  await Promise.all([assert.rejects(call, DisconnectedError), gone.promise, own.kill()])
})

test('the states of a connection are told', async (t) => {
  const own = await server()
  t.after(() => own.close())
  const app = (await connect(own.url('states'))).ref()
  const told = []
  let changed = promised()
  const subscription = app.onState((state) => { told.push(state); changed.resolve() })
  const ended = []
  app.onState(async (state) => { ended.push(state) })
  const until = async (...states) => {
    while (told.length < states.length) {
      await changed.promise
      changed = promised()
    }
    assert.deepEqual(told, states)
  }
  await own.restart()
  await until('disconnected', 'connected')
  assert.equal(app.isConnected, true)
  await subscription.close()
  await app.close()
  await new Promise(setImmediate)
  // The first one had stopped listening.
  assert.deepEqual(told, ['disconnected', 'connected'])
  assert.deepEqual(ended, ['disconnected', 'connected', 'closed'])
  assert.throws(() => app.onState(() => {}), DisconnectedError)
})

test('an app that was displaced says so', async (t) => {
  const [, , pool] = await place.pair(t)
  const url = place.server.url('displaced', pool)
  const first = (await connect(url)).ref()
  const told = new Promise((resolve) => first.onState(resolve))
  const second = await connect(url, { takeover: true })
  assert.equal(await told, 'displaced')
  await first.close()
  await second.close()
})

test('what a listener to the state throws is a warning', async (t) => {
  const own = await server()
  t.after(() => own.close())
  const app = (await connect(own.url('throws'))).ref()
  t.after(() => app.close())
  const warned = new Promise((resolve) => process.once('warning', resolve))
  app.onState(() => { throw new Error('mine') })
  assert.throws(() => app.onState(5), TypeError)
  await own.kill()
  assert.match((await warned).detail, /mine/)
})

test('an app counts what it lost', async (t) => {
  const [listens, emits] = await place.pair(t)
  const events = listens.events('news')
  await events.ready
  assert.equal(listens.lost, 0)
  await Promise.all(Array.from({ length: 1030 }, (_, n) => emits.emit('news', n)))
  // The server passes this on after the emits.
  await listens.serve('last', () => {})
  await emits.call('last')
  assert.equal(listens.lost, 6)
  assert.equal((await events.next()).value.data, 0)
})

test('without reconnecting, a loss ends the app and frees the process', async (t) => {
  const own = await server()
  t.after(() => own.close())
  const app = await connect(own.url('once'), { reconnect: false })
  await app.serve('f', () => 1)
  const events = app.events('e')
  await events.ready
  const next = events.next()
  await own.kill()
  assert.deepEqual(await next, { done: true, value: undefined })
  await assert.rejects(app.call('x'), DisconnectedError)
  await app.close()
})

test('a parked call outlives its caller', async (t) => {
  const own = await server()
  t.after(() => own.close())
  const before = await connect(own.url('shop'))
  await before.park('ship', 17, { id: 'order-17' })
  await before.close()
  await own.restart()
  const ships = await connect(own.url('ships'))
  t.after(() => ships.close())
  await ships.serve('ship', (order, { attempt }) => [order, attempt >= 1])
  const after = await connect(own.url('shop'))
  t.after(() => after.close())
  const { value } = await after.answers().next()
  assert.deepEqual([value.id, value.result()], ['order-17', [17, true]])
})

test('an app forgotten is collected, with its connection', async (t) => {
  const [, watches, pool] = await place.pair(t)
  const watch = watches.watch(pool)
  await watch.ready
  await (async () => { await connect(place.server.url('forgotten', pool)) })()
  let isGone = false
  const look = async () => {
    for await (const { event, appId } of watch) {
      if (appId === 'forgotten' && event === 'app_offline') break
    }
    isGone = true
  }
  await Promise.all([look(), collectUntil(() => isGone)])
})

test('a stream forgotten is cancelled', async (t) => {
  const [serves, calls] = await place.pair(t)
  const gone = promised()
  await serves.serve('wait', async function * (data, { signal }) {
    signal.addEventListener('abort', gone.resolve)
    yield 1
    await gone.promise
  })
  await (async () => { await calls.stream('wait').next() })()
  let isGone = false
  gone.promise.then(() => { isGone = true })
  await collectUntil(() => isGone)
})

test('a stream forgotten does not listen to its signal any more', async (t) => {
  const app = await place.app(t)
  const { signal } = new AbortController()
  for (let i = 0; i < 5; i++) app.stream('f', null, { signal })
  assert.equal(getEventListeners(signal, 'abort').length, 5)
  await collectUntil(() => getEventListeners(signal, 'abort').length === 0)
})

test('many megabytes that no string can hold are refused', {
  skip: totalmem() < 8e9, timeout: 120_000
}, async (t) => {
  const settings = ['max_frame=1GiB', 'outbox_bytes_max=1GiB', 'outbox_total_bytes_max=2GiB',
    'memory_max=8GiB']
  const own = await server(...settings.flatMap((setting) => ['--set', `limits.${setting}`]))
  t.after(() => own.close())
  const [serves, calls] = [await connect(own.url('serves')), await connect(own.url('calls'))]
  t.after(() => Promise.all([serves, calls].map((app) => app.close())))
  await serves.serve('length', (text) => text.length)
  // One operation of the server's side has the same number as the request.
  const waits = Array.from({ length: 20 }, () => serves.events('never').next())
  const text = 'x'.repeat(257 << 20)
  await assert.rejects(calls.call('length', text, { timeoutMs: 60_000 }), { code: 'too_large' })
  await serves.close()
  for (const end of await Promise.all(waits)) assert.equal(end.done, true)
})

test('both module systems have the same objects', () => {
  const required = createRequire(import.meta.url)('latzero')
  for (const name of Object.keys(required)) assert.equal(latzero[name], required[name])
  assert.deepEqual(Object.keys(latzero).toSorted(), Object.keys(required).toSorted())
})
