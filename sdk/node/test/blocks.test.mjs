// Memory blocks: typed arrays, views, locks, and blocks as arguments.

import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { test } from 'node:test'
import { Worker } from 'node:worker_threads'

import { BlockError, connect, writable } from 'latzero'
import { promised, withServer } from './helpers.mjs'

const place = withServer()
/** Whether arrays may be of the blocks' own memory. */
const isMapped = process.env.LATZERO_NO_EXTERNAL !== '1'
const fill = (value) => (array) => { array.fill(value) }

test('what waits for a block ends when it is closed, and when the app has ended', async (t) => {
  const app = await place.app(t, 'waits')
  const block = await app.block('waits', { size: 8, create: true })
  const changes = block.changes()
  await changes.ready
  const waits = [changes.next(), changes.next(), block.wait()]
  await app.ping()
  block.close()
  const closed = { name: 'BlockError', code: 'no_block' }
  for (const wait of waits) await assert.rejects(wait, closed)
  for (const later of [() => changes.next(), () => block.wait(0), () => block.changes().next()]) {
    await assert.rejects(later(), closed)
  }
  // Another instance takes the place of this one, which has then ended.
  const first = await place.app(t, 'once', 'default', { exclusive: true })
  const kept = await first.block('waits')
  const ended = Promise.allSettled([kept.changes().next(), kept.wait()])
  await first.ping()
  const second = await place.app(t, 'once', 'default', { exclusive: true, takeover: true })
  const [over, failed] = await ended
  assert.deepEqual([over.value?.done, failed.reason?.code], [true, 'disconnected'])
  await assert.rejects(kept.wait(), { code: 'disconnected' })
  assert.ok(second.isConnected)
})

test('a part past the end is refused with its offset, and no bytes are read', async (t) => {
  const app = await place.app(t, 'parts')
  const block = await app.block('parts', { size: 8, create: true })
  const remote = await connect(`latzero://far@${place.server.address}?pool=default`)
  t.after(() => remote.close())
  for (const one of [block, await remote.block('parts')]) {
    for (const [offset, length] of [[0, 0], [4, 0], [8, 0]]) {
      assert.deepEqual(await one.readAt(offset, length), Buffer.alloc(0))
    }
    assert.deepEqual(await one.readAt(4, 4), Buffer.alloc(4))
    for (const [offset, length] of [[5, 4], [9, 1], [0, 2 ** 50], [2 ** 50, 1]]) {
      await assert.rejects(one.readAt(offset, length), ({ code, message }) => {
        assert.equal(code, 'out_of_range')
        assert.doesNotMatch(message, /18446744073709551615/)
        return true
      })
    }
  }
  const reader = await app.block('parts', { write: false })
  await assert.rejects(reader.write(() => {}), ({ message }) => {
    assert.match(message, /for reading only: open it for writing, or /)
    return true
  })
})

test('numbers that are none are refused, and nothing is changed', async (t) => {
  const app = await place.app(t, 'numbers')
  const block = await app.block('numbers', { size: 8, create: true })
  const one = new Uint8Array([1])
  await block.write((bytes) => bytes.fill(7))
  for (const wrong of [NaN, -1, 1.9, Infinity, '1', null, 2 ** 60, 1n]) {
    for (const [name, call] of [
      ['nbytes', () => block.resize(wrong)], ['offset', () => block.readAt(wrong, 1)],
      ['length', () => block.readAt(0, wrong)], ['offset', () => block.writeAt(wrong, one)],
      ['offset', () => block.cas(wrong, one, one)], ['beyond', () => block.wait(wrong)],
      ['ifVersion', () => block.writeAt(0, one, { ifVersion: wrong })]
    ]) {
      const message = new RegExp(`^${name} is a whole`)
      await assert.rejects(call(), { name: 'TypeError', message })
    }
  }
  for (const given of [{ keep: 0 }, { keep: null }, { part: 5 }, { waitMs: NaN }]) {
    await assert.rejects(block.write(() => {}, given), TypeError)
  }
  for (const given of [{ shared: 1 }, { waitMs: -1 }, { leaseMs: NaN }]) {
    await assert.rejects(block.lock(given), TypeError)
  }
  assert.deepEqual(await block.read(), new Uint8Array(8).fill(7))
  assert.deepEqual([block.version, block.generation], [1, 1])
})

test('a block is read and written', async (t) => {
  const [makes, opens, pool] = await place.pair(t)
  const block = await makes.block('a', { shape: [2, 3], dtype: 'f4', create: true })
  assert.deepEqual([block.id, block.pool, block.nbytes, block.dtype, block.shape, block.version],
    ['a', pool, 24, '<f4', [2, 3], 0])
  assert.ok(block.isLive && block.isMapped)
  assert.equal(await block.write((array) => {
    assert.ok(array instanceof Float32Array && array.length === 6)
    array.set([1, 2, 3, 4, 5, 6])
  }), 1)
  const other = await opens.block('a')
  const copy = await other.read()
  assert.deepEqual(copy, new Float32Array([1, 2, 3, 4, 5, 6]))
  // A copy is nobody's but the caller's.
  copy.fill(0)
  const target = new Float32Array(6)
  assert.equal(await other.readInto(target), 1)
  assert.deepEqual(target, new Float32Array([1, 2, 3, 4, 5, 6]))
  assert.equal(await other.read((array, version) => array[5] + version), 7)
  assert.deepEqual(await other.readAt(4, 4), Buffer.from(new Float32Array([2]).buffer))
  await assert.rejects(other.readAt(20, 8), { code: 'out_of_range' })
  await assert.rejects(other.readInto(new Float32Array(5)), {
    name: 'TypeError', message: /^the target has 20 bytes, and the block has \d+$/
  })
  await assert.rejects(other.readInto('text'), TypeError)
  const shared = new Float32Array(new SharedArrayBuffer(24))
  assert.equal(await other.readInto(shared), 1)
  assert.equal(shared[5], 6)
  assert.equal((await makes.blocks())[0].block_id, 'a')
  assert.equal((await block.info()).block_id, 'a')
})

test('what a callback was given is gone when it has returned', async (t) => {
  const [makes] = await place.pair(t)
  const block = await makes.block('a', { shape: 8, dtype: 'u1', create: true })
  const kept = []
  await block.write(async (array) => {
    kept.push(array)
    array.fill(5)
    await null
    kept.push(array.subarray(2))
  })
  await block.read((array) => kept.push(array))
  assert.deepEqual(kept.map((array) => array.length), [0, 0, 0])
  kept[0][0] = 9
  assert.deepEqual(await block.read(), new Uint8Array(8).fill(5))
  assert.equal(block.version, 1)
  await assert.rejects(block.read(() => { throw new Error('mine') }), /mine/)
})

test('a version is discarded if its callback throws', async (t) => {
  const [makes, opens] = await place.pair(t)
  const block = await makes.block('a', { shape: 4, dtype: 'i4', create: true })
  await block.write(fill(1))
  for (const fails of [
    (array) => { array.fill(2); throw new Error('mine') },
    async (array) => { array.fill(2); await null; throw new Error('mine') }
  ]) {
    await assert.rejects(block.write(fails), /mine/)
  }
  const other = await opens.block('a')
  assert.deepEqual(await other.read(), new Int32Array(4).fill(1))
  // The lock was given back.
  assert.equal(await other.write(fill(3), { waitMs: 0 }), 2)
  await assert.rejects(block.write('no function'), TypeError)
})

test('a version begins as the one before, in part or not at all', async (t) => {
  const [makes] = await place.pair(t)
  const block = await makes.block('a', { shape: [4, 2], dtype: 'u2', create: true })
  await block.write(fill(1))
  await block.write((array) => { array[0] = 9 })
  assert.deepEqual(await block.read(), new Uint16Array([9, 1, 1, 1, 1, 1, 1, 1]))
  await block.write((array) => {
    assert.deepEqual(array, new Uint16Array([1, 1, 1, 1]))
    array.fill(7)
  }, { part: [1, 3] })
  assert.deepEqual(await block.read(), new Uint16Array([9, 1, 7, 7, 7, 7, 1, 1]))
  await block.write(fill(2), { keep: false })
  assert.deepEqual(await block.read(), new Uint16Array(8).fill(2))
  await block.write((array) => assert.equal(array.length, 0), { part: [2, 2] })
  for (const part of [[3, 5], [2, 1], [-1, 2], [0.5, 1]]) {
    await assert.rejects(block.write(fill(0), { part }), {
      name: 'TypeError', message: /^part is /
    })
  }
})

test('dtypes are typed arrays', async (t) => {
  const [makes] = await place.pair(t)
  const kinds = {
    i1: Int8Array, u1: Uint8Array, i2: Int16Array, u2: Uint16Array, i4: Int32Array,
    u4: Uint32Array, i8: BigInt64Array, u8: BigUint64Array, f4: Float32Array, f8: Float64Array
  }
  for (const [dtype, Kind] of Object.entries(kinds)) {
    for (const given of [dtype, Kind]) {
      const id = `b-${dtype}-${given === Kind}`
      const block = await makes.block(id, { shape: 2, dtype: given, create: true })
      const one = Kind.name.startsWith('Big') ? 1n : 1
      await block.write(fill(one))
      assert.deepEqual(await block.read(), new Kind(2).fill(one))
    }
  }
  const names = {
    '>f4': '>f4', '=f4': '<f4', b1: '|b1', S5: '|S5', V4: '|V4', M8: '<M8', m8: '<m8', c8: '<c8',
    c16: '<c16', f16: '<f16', bf16: 'bf16'
  }
  for (const [dtype, name] of Object.entries(names)) {
    const Kind = { '=f4': Float32Array, b1: Uint8Array }[dtype] ?? DataView
    const id = `c-${Object.keys(names).indexOf(dtype)}`
    const block = await makes.block(id, { shape: [2, 2], dtype, create: true })
    await block.write((array) => assert.ok(array instanceof Kind))
    const array = await (await makes.block(id, { shape: [2, 2], dtype })).read()
    assert.ok(array instanceof Kind)
    assert.equal(array.byteLength, block.nbytes)
    assert.deepEqual(block.layout, { dtype: name, shape: [2, 2] })
  }
  const plain = await makes.block('plain', { size: 5, create: 'new' })
  assert.deepEqual(await plain.read(), new Uint8Array(5))
  assert.deepEqual([plain.layout, plain.dtype, plain.shape], [null, null, null])
})

test('mistakes of opening', async (t) => {
  const [makes] = await place.pair(t)
  for (const given of [
    { create: true }, { shape: 2 }, { shape: 2, dtype: 'nonsense' }, { shape: [-1], dtype: 'f4' },
    { shape: 2, dtype: 'f4', size: 9 }, { size: 4, create: 'maybe' }, { size: -1, create: true },
    { size: 4, create: true, kind: 'odd' }, { size: 4, create: true, consistency: 'odd' },
    { size: 4, create: true, lifetime: 'odd' }, { siez: 4 }
  ]) {
    await assert.rejects(makes.block('a', given), TypeError)
  }
  await assert.rejects(makes.block('nowhere'), BlockError)
  await makes.block('a', { size: 4, create: 'new' })
  await assert.rejects(makes.block('a', { size: 4, create: 'new' }), { code: 'block_exists' })
  await assert.rejects(makes.block('a', { size: 8, create: true }), { code: 'block_exists' })
})

test('a view shows its version where it lies', async (t) => {
  const [makes] = await place.pair(t)
  const block = await makes.block('a', { shape: 4, dtype: 'f8', create: true })
  await block.write(fill(1))
  const view = await block.view()
  const array = view.array()
  assert.deepEqual([array, view.version, view.valid], [new Float64Array(4).fill(1), 1, true])
  assert.equal(view.array(), array)
  await block.write(fill(2))
  assert.ok(view.valid)
  await block.write(fill(3))
  assert.equal(view.valid, false)
  // The third version lies where the first did.
  const later = await block.view()
  assert.deepEqual([later.version, later.array()], [3, new Float64Array(4).fill(3)])
  if (isMapped) {
    assert.equal(array[0], 3)
    assert.equal(later.buffer, view.buffer)
  } else {
    assert.equal(array[0], 1)
  }
  await block.resize(64)
  assert.ok(view.stale && later.stale)
  const resized = await block.view()
  assert.equal(resized.buffer.byteLength, 64)
  assert.notEqual(resized.buffer, view.buffer)
  await block.remove()
  block.close()
  globalThis.gc?.()
  assert.deepEqual(later.array(), new Float64Array(4).fill(3))
})

test('a version is read where it lies, and again if it was written over', async (t) => {
  const [makes, opens] = await place.pair(t)
  const block = await makes.block('a', { shape: 4, dtype: 'u4', create: true })
  await block.write(fill(1))
  const other = await opens.block('a')
  const seen = []
  const sum = await other.read(async (array, version) => {
    const before = array[0]
    // Two newer versions: the second is written where this one lies.
    if (seen.length === 0) for (const value of [2, 3]) await block.write(fill(value))
    seen.push([version, before, array[3]])
    return array.reduce((a, b) => a + b)
  })
  assert.equal(sum, isMapped ? 12 : 4)
  assert.deepEqual(seen, isMapped ? [[1, 1, 3], [3, 3, 3]] : [[1, 1, 1]])
  // What a function throws at half a version does not count.
  let runs = 0
  assert.equal(await other.read(async (array) => {
    if (++runs > 1) return array[0]
    for (const value of [4, 5]) await block.write(fill(value))
    if (isMapped) throw new Error('torn')
    return array[0]
  }), isMapped ? 5 : 3)
  // Where writers are always faster, it gets a copy.
  runs = 0
  assert.equal(await other.read(async (array) => {
    const before = array[0]
    runs++
    for (const value of [6, 7]) await block.write(fill(10 * runs + value))
    return array[0] - before
  }), 0)
  assert.equal(runs, isMapped ? 4 : 1)
})

test('a stray write reaches nobody and does not last', async (t) => {
  const [makes, opens] = await place.pair(t)
  const shape = 20_000
  const block = await makes.block('a', { shape, dtype: 'u1', create: true })
  await block.write(fill(1))
  const ones = new Uint8Array(shape).fill(1)
  for (const write of [true, false]) {
    const other = await opens.block('a', { write })
    await other.read((array) => { array.fill(9) })
    const view = await other.view()
    assert.deepEqual(view.array(), ones)
    view.array().fill(9)
    assert.ok(view.valid)
    for (const reads of [block, other]) {
      assert.deepEqual(await reads.read(), ones)
      await reads.read((array) => assert.deepEqual(array, ones))
      assert.deepEqual((await reads.view()).array(), ones)
    }
  }
})

test('a view sent to another thread is a copy', async (t) => {
  const [makes] = await place.pair(t)
  const block = await makes.block('a', { shape: 4, dtype: 'u1', create: true })
  await block.write(fill(1))
  const view = await block.view()
  const copy = structuredClone(view.array())
  await block.write(fill(2))
  await block.write(fill(3))
  assert.deepEqual(copy, new Uint8Array(4).fill(1))
  assert.equal(view.array().length, 4)
})

test('a writer publishes many versions under one lock', async (t) => {
  const [makes, opens] = await place.pair(t)
  for (const kind of ['shared', 'persistent']) {
    const given = { shape: [4, 2], dtype: 'i4', create: true, kind }
    const block = await makes.block(kind, given)
    const other = await opens.block(kind)
    const writer = await block.writer()
    assert.ok(writer.isHeld && writer.fence > 0)
    await assert.rejects(other.writer({ waitMs: 10 }), { code: 'locked' })
    // One after another, however they were begun.
    const versions = await Promise.all([
      writer.write(fill(1), { keep: false }),
      writer.write(async (array) => { await null; array[0] += 4 }),
      writer.write((array) => { assert.deepEqual([...array], [1, 1]); array.fill(7) },
        { part: [2, 3] })
    ])
    assert.deepEqual(versions, [1, 2, 3])
    const expected = new Int32Array([5, 1, 1, 1, 7, 7, 1, 1])
    assert.deepEqual(await other.read(), expected)
    const fails = (array) => { array.fill(8); throw new Error('mine') }
    await assert.rejects(writer.write(fails), /mine/)
    await assert.rejects(writer.write(fill(8), { part: [3, 5] }), /^TypeError: part is /)
    await assert.rejects(writer.write('no function'), TypeError)
    assert.deepEqual(await other.read(), expected)
    assert.equal(await writer.write((array) => { array[7] = 9 }), 4)
    assert.equal((await other.read())[7], 9)
    const kept = []
    await writer.write((array) => { kept.push(array) })
    assert.equal(kept[0].length, 0)
    const last = writer.write(fill(3), { keep: false })
    await writer.close()
    assert.equal(await last, 6)
    assert.equal(writer.isHeld, false)
    await assert.rejects(writer.write(fill(1)), /closed/)
    await writer.close()
    assert.equal(await other.write(fill(4)), 7)
  }
})

test('a writer that lost its lock publishes nothing', async (t) => {
  const [makes, opens] = await place.pair(t)
  const block = await makes.block('a', { size: 4, create: true })
  const other = await opens.block('a')
  const view = await other.view()
  const writer = await block.writer()
  await assert.rejects(writer.write(async (array) => {
    array.fill(2)
    await block.remove()
  }), BlockError)
  assert.deepEqual([view.array(), view.stale], [new Uint8Array(4), true])
  await assert.rejects(writer.write(fill(1)), BlockError)
  await writer.close()
})

test('newer versions are waited for', async (t) => {
  const [makes, opens] = await place.pair(t)
  const block = await makes.block('a', { shape: 1, dtype: 'u4', create: true })
  const other = await opens.block('a')
  const next = other.wait()
  await block.write(fill(1))
  assert.equal(await next, 1)
  assert.equal(await other.wait(0), 1)
  await assert.rejects(other.wait(1, { timeoutMs: 10 }), { code: 'timeout' })
  const signal = AbortSignal.timeout(10)
  await assert.rejects(other.wait(1, { signal }), { name: 'TimeoutError' })
  const changes = other.changes()
  await changes.ready
  await block.write(fill(2))
  assert.equal((await changes.next()).value, 2)
  const left = changes.next()
  await changes.return()
  assert.deepEqual(await left, { done: true, value: undefined })
})

test('locks', async (t) => {
  const [makes, opens] = await place.pair(t)
  const block = await makes.block('a', { size: 4, create: true })
  const other = await opens.block('a')
  const lock = await block.lock()
  assert.ok(lock.isHeld && lock.fence > 0)
  await assert.rejects(other.write(fill(1), { waitMs: 10 }), { code: 'locked' })
  await lock.unlock()
  await assert.rejects(lock.unlock(), TypeError)
  assert.equal(lock.isHeld, false)
  const shared = await Promise.all([block, other].map((b) => b.lock({ shared: true })))
  await Promise.all(shared.map((lock) => lock.unlock()))
  const leased = await other.lock({ leaseMs: 60_000 })
  await leased.renew(60_000)
  await leased.unlock()
  assert.equal(await block.write(fill(1), { waitMs: 0 }), 1)
})

test('bytes are written and swapped through the server', async (t) => {
  const [makes] = await place.pair(t)
  const block = await makes.block('a', { size: 8, create: true })
  assert.equal(await block.writeAt(2, Buffer.from([5, 6])), 1)
  await assert.rejects(block.writeAt(0, Buffer.from([1]), { ifVersion: 7 }),
    { code: 'version_conflict' })
  assert.equal(await block.writeAt(0, new Uint8Array([1]), { ifVersion: 1 }), 2)
  await assert.rejects(block.writeAt(8, Buffer.from([1])), { code: 'out_of_range' })
  await assert.rejects(block.writeAt(0, 'text'), { name: 'BadRequestError' })
  const raw = await makes.block('raw', { size: 8, create: true, consistency: 'raw' })
  const [zeros, ones] = [Buffer.alloc(8), Buffer.alloc(8, 1)]
  assert.equal(await raw.cas(0, zeros, ones), undefined)
  assert.deepEqual(await raw.cas(0, zeros, ones), ones)
})

test('blocks are resized, removed and closed', async (t) => {
  const [makes, opens] = await place.pair(t)
  const block = await makes.block('a', { size: 4, create: true })
  const other = await opens.block('a')
  await block.resize(16)
  assert.equal((await other.read()).length, 16)
  assert.equal(other.nbytes, 16)
  await other.remove()
  await assert.rejects(makes.block('a'), { code: 'no_block' })
})

test('a closed block says so, whatever it is asked', async (t) => {
  const [makes] = await place.pair(t)
  const block = await makes.block('a', { shape: 4, dtype: 'u1', create: true })
  await block.write(fill(1))
  const view = await block.view()
  const closed = (error) => {
    assert.ok(error instanceof BlockError, error.stack)
    assert.match(error.message, /'a' was closed/)
    return error.code === 'no_block' && error.ran === 'no'
  }
  // It is closed by who reads it, for whom the memory stays.
  const seen = await block.read((array) => { block.close(); return [...array] })
  assert.deepEqual(seen, [1, 1, 1, 1])
  assert.deepEqual(view.array(), new Uint8Array(4).fill(1))
  assert.ok(view.valid && !view.stale)
  for (const name of [
    'nbytes', 'version', 'generation', 'isLive', 'isMapped', 'layout', 'dtype', 'shape'
  ]) {
    assert.throws(() => block[name], closed, name)
  }
  const bytes = new Uint8Array(4)
  const asks = {
    read: [[], [(array) => array]], readInto: [[bytes]], readAt: [[0, 1]], view: [[]],
    write: [[fill(2)]], writer: [[]], writeAt: [[0, bytes]], cas: [[0, bytes, bytes]], wait: [[]],
    lock: [[]], resize: [[8]], flush: [[]], remove: [[]], info: [[]]
  }
  for (const [name, all] of Object.entries(asks)) {
    for (const given of all) await assert.rejects(async () => block[name](...given), closed, name)
  }
  await assert.rejects(block.changes().next(), closed)
  await assert.rejects(makes.call('f', { block }), closed)
  assert.deepEqual(block.handle, { id: 'a', pool: block.pool })
  block.close()
})

test('an app and a block are no data of a clone', async (t) => {
  const [makes] = await place.pair(t)
  const block = await makes.block('a', { size: 4, create: true })
  const { port1, port2 } = new MessageChannel()
  for (const [value, what] of [[block, /send block\.handle/], [makes, /connects by itself/]]) {
    for (const send of [structuredClone, (data) => port1.postMessage(data)]) {
      assert.throws(() => send({ value }), { name: 'DataCloneError', message: what })
    }
    const work = () => new Worker('', { eval: true, workerData: value })
    assert.throws(work, { name: 'DataCloneError', message: what })
  }
  assert.deepEqual(structuredClone(block.handle), { id: 'a', pool: block.pool })
  port2.close()
})

test('the layout of a block that was resized is what its arrays have', async (t) => {
  const [makes, opens] = await place.pair(t)
  const plain = await makes.block('plain', { size: 40, create: true })
  const about = ({ layout, dtype, shape }) => ({ layout, dtype, shape })
  for (const [dtype, Typed, name] of [['f4', Float32Array, '<f4'], ['>i4', DataView, '>i4']]) {
    const block = await makes.block(`a${dtype.length}`, { shape: [10], dtype, create: true })
    const other = await opens.block(block.id)
    const whole = { layout: { dtype: name, shape: [10] }, dtype: name, shape: [10] }
    for (const one of [block, other]) assert.deepEqual(about(one), whole)
    await block.resize(80)
    for (const one of [block, other]) {
      assert.deepEqual(await one.read(), new Uint8Array(80))
      assert.deepEqual(about(one), about(plain))
    }
    await block.write((rows) => assert.deepEqual(rows, new Uint8Array(2)), { part: [78, 80] })
    await block.resize(40)
    for (const one of [block, other]) {
      assert.ok((await one.read()) instanceof Typed)
      assert.deepEqual(about(one), whole)
    }
  }
})

test('a persistent block is not mapped, and works by copies', async (t) => {
  const [makes, opens] = await place.pair(t)
  const given = { shape: [4, 2], dtype: 'i4', create: true, kind: 'persistent' }
  const block = await makes.block('p', given)
  await block.write(fill(3))
  await block.write((array) => {
    assert.deepEqual(array, new Int32Array(2).fill(3))
    array[0] = 4
  }, { part: [1, 2] })
  assert.equal(await block.flush(), block.version)
  const other = await opens.block('p')
  const expected = new Int32Array([3, 3, 4, 3, 3, 3, 3, 3])
  assert.deepEqual(await other.read(), expected)
  const target = new Int32Array(8)
  await other.readInto(target)
  assert.deepEqual(target, expected)
  await assert.rejects(other.view(), { code: 'storage' })
})

test('blocks over TCP work by copies', async (t) => {
  const { connect } = await import('latzero')
  const url = (id) => `latzero://${id}@${place.server.address}?pool=tcp`
  const apps = await Promise.all(['makes', 'opens'].map((id) => connect(url(id))))
  t.after(() => Promise.all(apps.map((app) => app.close())))
  const block = await apps[0].block('a', { shape: 100_000, dtype: 'f8', create: true })
  assert.equal(block.isMapped, false)
  await block.write((array) => { for (let i = 0; i < array.length; i++) array[i] = i })
  const other = await apps[1].block('a')
  assert.equal(await other.read((array) => array[99_999]), 99_999)
  await other.write((array) => { array[0] = -1 })
  assert.deepEqual((await block.read()).subarray(0, 2), new Float64Array([-1, 1]))
  const changes = other.changes()
  await changes.ready
  const version = await block.write(fill(0), { keep: false })
  assert.equal((await changes.next()).value, version)
  await changes.return()
  await assert.rejects(other.view(), { code: 'storage' })
  const writer = await other.writer()
  await writer.write(fill(2), { keep: false })
  await writer.write((array) => { array[0] = 3 }, { part: [5, 6] })
  await writer.close()
  assert.deepEqual((await block.read()).subarray(4, 7), new Float64Array([2, 3, 2]))
})

test('a block goes along with a call', async (t) => {
  const [serves, calls] = await place.pair(t)
  const block = await calls.block('frame', { shape: 4, dtype: 'f4', create: true })
  await block.write(fill(2))
  const kept = []
  await serves.serve('sum', async ({ image, list: [same] }, request) => {
    kept.push(image)
    assert.equal(request.block('frame').id, same.id)
    assert.throws(() => request.block('other'), { code: 'no_block' })
    return image.read((array) => array.reduce((a, b) => a + b))
  })
  assert.equal(await calls.call('sum', { image: block, list: [block] }), 8)
  await serves.serve('double', async (image) => {
    await image.write((array) => array.forEach((x, i) => { array[i] = 2 * x }))
  })
  await calls.call('double', writable(block))
  assert.deepEqual(await block.read(), new Float32Array(4).fill(4))
  await assert.rejects(calls.call('double', block), { type: 'ForbiddenError' })
  await assert.rejects(calls.emit('sum', { image: block }), /along with a call/)
  await serves.serve('gives', () => ({ block: kept[0] }))
  await assert.rejects(calls.call('gives'), /along with a call/)
  assert.throws(() => writable(5), TypeError)
  // A reference that is not lent stays what it is.
  await serves.serve('plain', (data) => data)
  assert.deepEqual(await calls.call('plain', { $block: 'frame' }), { $block: 'frame' })
  // Outside of calls it is plain JSON.
  assert.equal(JSON.parse(JSON.stringify({ block })).block.$block, 'frame')
})

test('many blocks opened and forgotten keep no memory and no descriptors', { timeout: 300_000 },
  () => {
    const script = fileURLToPath(new URL('many-blocks.mjs', import.meta.url))
    execFileSync(process.execPath, ['--expose-gc', script, place.server.url('many')],
      { stdio: 'inherit' })
  })

test('everything works where the engine takes no memory of others', { timeout: 120_000 }, (t) => {
  if (process.env.LATZERO_NO_EXTERNAL === '1') return
  const script = fileURLToPath(import.meta.url)
  const env = { ...process.env, LATZERO_NO_EXTERNAL: '1' }
  delete env.NODE_TEST_CONTEXT
  execFileSync(process.execPath, ['--test', '--test-name-pattern', '^(?!many)', script], { env })
})
