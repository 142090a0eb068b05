// Each row of the table of JSON values in docs/node.md.

import assert from 'node:assert/strict'
import { test } from 'node:test'

import { BadRequestError, Failure } from 'latzero'
import { withServer } from './helpers.mjs'

const place = withServer()

const same = [
  null, true, false, 0, -1, 0.1, 1e300, 5e-324, 2 ** 53 - 1, -(2 ** 53) + 1,
  '', 'ä\n"\\\u0001😀',
  [], {}, [1, [2, { a: null }]], { a: { b: [1.5, 'x'] } }, { '': 1, 'a b': 2 }, '\u2028',
  JSON.parse('{"__proto__": {"a": 1}, "constructor": 1, "then": 5, "toString": null}')
]

for (const bigint of [false, true]) {
  test(`JSON comes back as it went, with bigint: ${bigint}`, async (t) => {
    const app = await place.app(t, 'json', 'system', { bigint })
    for (const value of same) {
      const back = await app.call('echo', value)
      assert.deepEqual(back, value)
      assert.equal(Object.getPrototypeOf(back ?? {}), Object.getPrototypeOf(value ?? {}))
    }
    const all = await Promise.all(same.map((value) => app.call('echo', value)))
    assert.deepEqual(all, same)
  })
}

test('what JSON.stringify leaves out or changes', async (t) => {
  const app = await place.app(t, 'json', 'system')
  const date = new Date(0)
  const rows = [
    [undefined, null],
    [{ a: undefined, b: 1, c: () => {}, [Symbol('s')]: 1 }, { b: 1 }],
    [[undefined, NaN, Infinity, -Infinity], [null, null, null, null]],
    [NaN, null],
    [{ at: date, url: new URL('http://a/') }, { at: date.toISOString(), url: 'http://a/' }],
    [-0, 0],
    ['\ud83d\ude00', '\u{1f600}'],
    [new Map([[1, 2]]), {}],
    [{ toJSON: () => ({ n: 5n }) }, { n: 5 }],
    [[Object(5n), new String('\u{1f600}'), new Number(2)], [5, '\u{1f600}', 2]]
  ]
  for (const [value, expected] of rows) {
    assert.deepEqual(await app.call('echo', value), expected)
  }
})

test('a bigint is written exactly, and read as it is asked for', async (t) => {
  const exact = await place.app(t, 'exact', 'system', { bigint: true })
  const rounded = await place.app(t, 'rounded', 'system')
  const values = [2n ** 63n, 2n ** 64n - 1n, -(2n ** 63n), 2n ** 53n, -(2n ** 53n)]
  for (const value of values) {
    assert.equal(await exact.call('echo', value), value)
    assert.equal(await rounded.call('echo', value), Number(value))
    assert.deepEqual(await exact.call('echo', { a: [value, '9007199254740993"'], b: 0.5 }),
      { a: [value, '9007199254740993"'], b: 0.5 })
  }
  assert.equal(await exact.call('echo', 5n), 5)
  const text = 'x\\"9007199254740993\\\\'
  const mixed = { [text]: text, n: [1, -2.5e-3, 9007199254740993n, true, null, '', {}, []] }
  assert.deepEqual(await exact.call('echo', mixed), mixed)
  const hostile = JSON.parse('{"__proto__": 1, "n": 1}')
  const back = await exact.call('echo', { hostile, n: 2n ** 60n })
  assert.deepEqual([Object.keys(back.hostile), back.n], [['__proto__', 'n'], 2n ** 60n])
  for (const [value, at] of [
    [2n ** 64n, 'data'], [{ a: [1, -(2n ** 63n) - 1n] }, 'data.a[1]'],
    [[Object(2n ** 64n)], 'data[0]']
  ]) {
    await assert.rejects(exact.call('echo', value), {
      name: 'BadRequestError', ran: 'no', message: `${at}: integers are from -2^63 to 2^64-1`
    })
  }
})

test('an integer that could not be sent as a bigint is read as a number', async (t) => {
  const exact = await place.app(t, 'exact', 'system', { bigint: true })
  const plain = await place.app(t, 'plain', 'system')
  await exact.join('integers')
  await plain.join('integers')
  await exact.serve('back', (x) => x)
  for (const value of [1e20, -1e20, 2 ** 64, -(2 ** 63) - 2048, 123456789012345680000]) {
    for (const app of [exact, plain]) {
      assert.equal(await app.call('echo', value, { pool: 'system' }), value)
      assert.deepEqual(await app.call('back', [value], { pool: 'integers' }), [value])
    }
  }
  // Neither do these lose anything.
  const longest = [-(2n ** 63n), 2n ** 64n - 1n]
  assert.deepEqual(await exact.call('back', longest, { pool: 'integers' }), longest)
})

test('strict refuses what is no number', async (t) => {
  const app = await place.app(t, 'strict', 'system', { strict: true })
  for (const [value, at] of [
    [NaN, 'data'], [{ values: [1, 2, 3, NaN] }, 'data.values[3]'], [[-Infinity], 'data[0]'],
    [{ a: new Number(NaN) }, 'data.a'],
    [[Object.assign(new Number(Infinity), { b: 1 })], 'data[0]'],
    [{ toJSON: () => [Infinity] }, 'data[0]'], [{ toJSON: () => new Number(NaN) }, 'data'],
    [[{ a: 1 }, { b: { toJSON: () => ({ a: [5, { c: NaN }] }) } }], 'data[1].b.a[1].c'],
    [{ a: { toJSON: () => ({ b: 1 }), b: NaN }, c: NaN }, 'data.c'],
    [{ a: 5n, b: [[1n], { toJSON: () => NaN }] }, 'data.b[1]']
  ]) {
    const expected = { message: `${at}: NaN and infinities are not JSON`, ran: 'no' }
    await assert.rejects(app.call('echo', value), expected)
    await assert.rejects(app.emit('echo', value), expected)
  }
  const numbers = { a: new Number(5), b: { toJSON: () => new Number(0.5) } }
  assert.deepEqual(await app.call('echo', numbers), { a: 5, b: 0.5 })
  const plain = await place.app(t, 'plain', 'system')
  assert.deepEqual(await plain.call('echo', [new Number(NaN)]), [null])
})

test('bytes travel raw', async (t) => {
  const [serves, calls] = await place.pair(t)
  await serves.serve('back', (data) => {
    assert.ok(Buffer.isBuffer(data))
    return Uint8Array.from(data).reverse()
  })
  const memory = new Uint8Array([9, 0, 255, 49, 9])
  const shared = new Uint8Array(new SharedArrayBuffer(3))
  shared.set([0, 255, 49])
  for (const data of [
    Buffer.from([0, 255, 49]), memory.subarray(1, 4), memory.slice(1, 4).buffer,
    new DataView(memory.buffer, 1, 3), shared, shared.buffer
  ]) {
    const back = await calls.call('back', data)
    assert.ok(Buffer.isBuffer(back))
    assert.deepEqual(back, Buffer.from([49, 255, 0]))
  }
  assert.deepEqual(await calls.call('back', new Uint8Array(0)), Buffer.alloc(0))
  assert.deepEqual((await calls.reply('back', Buffer.from('ab'))).data, Buffer.from('ba'))
  const floats = new Float32Array([1.5, 2.5])
  await serves.serve('floats', (data) => new Float32Array(Uint8Array.from(data).buffer)[1])
  assert.equal(await calls.call('floats', floats), 2.5)
})

test('bytes inside of JSON are refused, with their place', async (t) => {
  const [serves, calls] = await place.pair(t)
  const message = 'bytes do not go inside JSON: send them whole, or as a block'
  for (const [value, at] of [
    [{ a: Buffer.from('x') }, 'data.a'], [[new Float64Array(1)], 'data[0]'],
    [{ a: { b: [1, new ArrayBuffer(1)] } }, 'data.a.b[1]'],
    [{ toJSON: () => ({ x: Buffer.from('x') }) }, 'data.x']
  ]) {
    await assert.rejects(calls.call('nobody', value), { message: `${at}: ${message}`, ran: 'no' })
  }
  await serves.serve('f', () => ({ a: new Uint8Array(1) }))
  await assert.rejects(calls.call('f'), {
    code: 'handler_error', message: `TypeError: the answer can't be sent: data.a: ${message}`
  })
})

const LONE = 'a\ud800'

test('lone surrogates are refused, with their place', async (t) => {
  const app = await place.app(t, 'lone', 'system')
  const refused = (at) => ({
    name: 'BadRequestError', ran: 'no', message: `${at}: lone surrogates cannot be sent`
  })
  for (const [value, at] of [
    [LONE, 'data'], [{ a: LONE }, 'data.a'], [[1, ['\udc00b']], 'data[1][0]'],
    [[new String(LONE)], 'data[0]'],
    [{ b: [{ [LONE]: 1 }] }, 'data.b[0].a\ufffd'], [{ at: { toJSON: () => LONE } }, 'data.at'],
    [{ n: 2n ** 60n, text: '\udbff\ud800\udc00' }, 'data.text']
  ]) {
    await assert.rejects(app.call('echo', value), refused(at))
    await assert.rejects(app.emit('echo', value), refused(at))
    assert.throws(() => app.stream('echo', value), refused(at))
  }
  for (const given of [{ key: LONE }, { pool: LONE }, { to: LONE }, { idempotencyKey: LONE }]) {
    const [name] = Object.keys(given)
    await assert.rejects(app.call('echo', 1, given), refused(`options.${name}`))
  }
  await assert.rejects(app.call('echo', 1, { headers: { h: LONE } }), refused('options.headers.h'))
  await assert.rejects(app.call('echo', 1, { headers: { [LONE]: '' } }),
    refused('options.headers.a\ufffd'))
  await assert.rejects(app.serve('x', () => 1, { doc: LONE }), refused('options.doc'))
  for (const call of [
    () => app.call(LONE), () => app.serve(LONE, () => 1), () => app.join(LONE),
    () => app.block(LONE), () => app.events(LONE).ready, () => app.blocks(LONE)
  ]) {
    await assert.rejects(call(), refused("'a\ufffd'"))
  }
  await assert.rejects(app.block('b', { pool: LONE }), refused('options.pool'))
  // These only look like them.
  for (const value of ['\\ud800', '\\\\ud800', '"\\ud800"', { '\\ud800': '\ud800\udc00' }]) {
    assert.deepEqual(await app.call('echo', value), value)
  }
})

test('an error with lone surrogates arrives with all that it has', async (t) => {
  const [serves, calls] = await place.pair(t)
  await serves.serve('throws', () => { throw new RangeError(LONE) })
  const error = await calls.call('throws').catch((error) => error)
  assert.deepEqual([error.name, error.type, error.message, error.data.message],
    ['HandlerFailedError', 'RangeError', 'RangeError: a\ufffd', 'a\ufffd'])
  assert.match(error.remoteTraceback, /^RangeError: a\ufffd\n +at /)
  const text = '\\ud800\\\\'
  await serves.serve('fails', () => {
    throw new Failure('own', LONE, { [LONE]: [LONE, text + LONE], text, n: 1 })
  })
  await assert.rejects(calls.call('fails'), {
    code: 'own',
    message: 'a\ufffd',
    data: { 'a\ufffd': ['a\ufffd', `${text}a\ufffd`], text, n: 1 }
  })
  await serves.serve('answers', () => [LONE])
  await assert.rejects(calls.call('answers'), {
    code: 'handler_error',
    message: "TypeError: the answer can't be sent: data[0]: lone surrogates cannot be sent"
  })
})

test('data that is too deep or no data is refused', async (t) => {
  const app = await place.app(t, 'deep', 'system')
  let deep = []
  for (let i = 1; i < 128; i++) deep = [deep]
  assert.deepEqual(await app.call('echo', deep), deep)
  await assert.rejects(app.call('echo', [deep]), BadRequestError)
  const round = {}
  round.round = round
  await assert.rejects(app.call('echo', round), /deeper than 128 levels, or contains itself/)
  for (const value of [() => {}, Symbol('s')]) {
    await assert.rejects(app.call('echo', value), BadRequestError)
  }
  await assert.rejects(app.call('echo', { toJSON () { throw new Error('mine') } }), /mine/)
})

test('large payloads', async (t) => {
  const app = await place.app(t, 'large', 'system')
  const text = 'ä"'.repeat(1_000_000)
  assert.equal(await app.call('echo', text), text)
  const bytes = Buffer.alloc(8 * 1024 * 1024, 7)
  assert.ok(bytes.equals(await app.call('echo', bytes)))
  const huge = Buffer.alloc(64 * 1024 * 1024)
  await assert.rejects(app.call('echo', huge), BadRequestError)
  // The connection goes on.
  assert.equal(await app.call('echo', 1), 1)
  const many = Array.from({ length: 20 }, (_, i) => app.call('echo', String(i).repeat(300_000)))
  assert.equal((await Promise.all(many))[19].length, 600_000)
})
