'use strict'

// Memory blocks, as typed arrays.

const { isSharedArrayBuffer } = require('node:util').types

const addon = require('./addon.cjs').load()
const { badRequest, errorOf, own, thrown } = require('./errors.cjs')
const { Sent, bytesOf, isBytes } = require('./json.cjs')
const { check, checkWhole, pick, refuse, textFrom } = require('./options.cjs')
const { Inflow } = require('./streams.cjs')

const ERROR = addon.What.Error
const OVER = { what: addon.What.Over, meta: 0, payload: undefined }

const UNCLONEABLE = Symbol('a Block of latzero: send block.handle, for app.block(handle)')

/** How often a version is copied anew that was written over. */
const TRIES_MAX = 64

/** How often a function runs on the block's memory before it gets a copy. */
const RUNS_MAX = 3

const ARRAYS = {
  b1: Uint8Array,
  i1: Int8Array,
  u1: Uint8Array,
  i2: Int16Array,
  u2: Uint16Array,
  i4: Int32Array,
  u4: Uint32Array,
  i8: BigInt64Array,
  u8: BigUint64Array,
  f2: globalThis.Float16Array,
  f4: Float32Array,
  f8: Float64Array
}

const OPTIONS = [
  'shape', 'dtype', 'size', 'create', 'write', 'pool', 'kind', 'consistency', 'slots',
  'readableBy', 'writableBy', 'lifetime'
]

/** The order and the kind of an element, and its size in bytes. */
const DTYPE = /^([<>|=]?)([biufcmMSV])([0-9]+)$/

/** What a dtype says; `null` if it is none. */
function elementOf (dtype) {
  // It has no order, since numpy has no name for it.
  if (dtype === 'bf16') return { order: '', kind: dtype, size: 2 }
  const found = DTYPE.exec(dtype)
  if (found === null) return null
  const [, order, kind, digits] = found
  const size = Number(digits)
  const hasOrder = size > 1 && kind !== 'S' && kind !== 'V'
  return { order: !hasOrder ? '|' : order === '>' ? '>' : '<', kind: kind + digits, size }
}

/** A dtype in numpy's spelling, and the size of an element in bytes. */
function dtypeOf (dtype) {
  const known = Object.keys(ARRAYS).findLast((name) => ARRAYS[name] === dtype)
  const found = elementOf(known ?? dtype)
  if (found === null) {
    throw new TypeError(`a dtype is like 'f4' or Float32Array, not ${String(dtype)}`)
  }
  return { name: found.order + found.kind, size: found.size }
}

/** The layout that is asked for, with its size in bytes; `undefined` if there is none. */
function layoutOf (shape, dtype) {
  if (shape === undefined && dtype === undefined) return undefined
  if (shape === undefined || dtype === undefined) {
    throw new TypeError('a layout has both `shape` and `dtype`')
  }
  const lengths = typeof shape === 'number' ? [shape] : [...shape]
  if (!lengths.every((length) => Number.isSafeInteger(length) && length >= 0)) {
    throw new TypeError('a shape consists of lengths')
  }
  const { name, size } = dtypeOf(dtype)
  return { layout: [name, lengths], size: lengths.reduce((a, b) => a * b, size) }
}

/** The layout that a block was made with, and its size in bytes if the dtype says that. */
function readLayout (json) {
  const { dtype, shape } = JSON.parse(json)
  if (typeof dtype !== 'string' || !Array.isArray(shape)) return { layout: null, size: undefined }
  const size = elementOf(dtype)?.size
  return { layout: { dtype, shape }, size: size && shape.reduce((a, b) => a * b, size) }
}

/** What the binding opens a block with. */
function blockOptions (given) {
  const {
    shape, dtype, size, create = false, write = null, pool = null, kind = 'shared',
    consistency = 'snapshot', slots = 2, readableBy = null, writableBy = null, lifetime = 'pool'
  } = pick(given, OPTIONS)
  const found = layoutOf(shape, dtype)
  if (found !== undefined && size !== undefined && size !== found.size) {
    throw new TypeError(`size is ${size}, but the layout takes ${found.size} bytes`)
  }
  if (create !== false && found === undefined && size === undefined) {
    throw new TypeError('a new block takes `shape` and `dtype`, or `size`')
  }
  return textFrom({
    layout: found?.layout ?? null,
    size: size ?? found?.size ?? 0,
    create: create === true ? 'attach' : create === 'new' ? 'new' : null,
    write,
    pool,
    kind,
    consistency,
    slots,
    lifetime,
    readableBy,
    writableBy
  })
}

/** Memory as the layout says; as bytes where it is not of that size. */
function arrayOf (buffer, layout) {
  if (layout === null) return new Uint8Array(buffer)
  const element = elementOf(layout.dtype)
  const Typed = element === null || element.order === '>' ? undefined : ARRAYS[element.kind]
  if (Typed === undefined) return new DataView(buffer)
  const count = layout.shape.reduce((a, b) => a * b, 1)
  if (count * Typed.BYTES_PER_ELEMENT !== buffer.byteLength) return new Uint8Array(buffer)
  return new Typed(buffer)
}

/** Where the rows of `part` are: offset, length and their layout. */
function rowsOf (part, nbytes, layout) {
  if (part === undefined) return { offset: 0, length: nbytes, layout }
  const rows = layout !== null && layout.shape.length > 0 ? layout.shape[0] : nbytes
  const [start, end] = part
  const isRange = Number.isSafeInteger(start) && Number.isSafeInteger(end) &&
    start >= 0 && start <= end && end <= rows
  if (!isRange) refuse('part', part, { what: `[start, end] of the ${rows} rows` })
  const row = rows > 0 ? nbytes / rows : 0
  return {
    offset: start * row,
    length: (end - start) * row,
    layout: layout && { ...layout, shape: [end - start, ...layout.shape.slice(1)] }
  }
}

/** The lock of a block. Not referred to any more, it is given back. */
class Lock {
  #connection
  #native

  constructor (connection, native) {
    this.#connection = connection
    this.#native = native
    this.fence = native.fence
  }

  get isHeld () {
    return this.#native.isHeld
  }

  async renew (leaseMs) {
    if (leaseMs !== undefined) check('leaseMs', leaseMs)
    await this.#connection.run((native, token) => this.#native.renew(native, token, leaseMs))
  }

  async unlock () {
    await this.#connection.run((native, token) => this.#native.unlock(native, token))
  }

  [Symbol.asyncDispose] () {
    return this.unlock()
  }
}

/** One version of a block. */
class View {
  #native
  #layout
  #array

  constructor (native, layout, buffer) {
    this.#native = native
    this.#layout = layout
    this.buffer = buffer
    this.version = native.version
  }

  /** The version as a typed array; always the same. */
  array () {
    this.#array ??= arrayOf(this.buffer, this.#layout)
    return this.#array
  }

  /** Whether the block's memory still has this version. */
  get valid () {
    return this.#native.isValid
  }

  /** Whether the block was resized or removed since. */
  get stale () {
    return this.#native.isStale
  }
}

/** The next version of a block, while a function of the user's writes it. */
class Draft {
  #native
  #readAt

  /** `readAt(offset, length)` reads the version before. */
  constructor (native, readAt) {
    this.#native = native
    this.#readAt = readAt
  }

  /** Hands a range to `fn` as the layout says. If anything fails, the version is discarded. */
  async fill (fn, { offset, length, layout }, keep) {
    try {
      const shared = this.#native.expose(offset, length, keep)
      const buffer = shared ?? await this.#copy(offset, length, keep)
      try {
        await fn(arrayOf(buffer, layout))
        if (buffer.byteLength !== length) {
          throw new TypeError('the memory of a version stays where it is: it was transferred')
        }
        if (shared === null && length > 0) this.#native.write(offset, new Uint8Array(buffer))
      } finally {
        addon.detach(buffer)
      }
    } catch (error) {
      this.#native.abandon()
      throw thrown(error)
    }
  }

  /** Memory for a part that is not written in place. */
  #copy (offset, length, keep) {
    return keep && length > 0 ? this.#readAt(offset, length) : new ArrayBuffer(length)
  }
}

/** The lock of a block under which many versions are written. */
class Writer {
  #connection
  #native
  #write
  #turn = Promise.resolve()

  /** `write(version, fn, part, keep)` fills a version. */
  constructor (connection, native, write) {
    this.#connection = connection
    this.#native = native
    this.#write = write
    this.fence = native.fence
  }

  get isHeld () {
    return this.#native.isHeld
  }

  /** Hands the next version to `fn`, and publishes it; its number. One after another. */
  async write (fn, given) {
    if (typeof fn !== 'function') throw new TypeError('write takes a function')
    const { keep = true, part } = pick(given, ['keep', 'part'])
    const written = this.#turn.then(() => this.#next(fn, part, keep))
    this.#turn = written.catch(() => {})
    return written
  }

  async #next (fn, part, keep) {
    let version
    try {
      version = this.#native.begin()
    } catch (error) {
      throw thrown(error)
    }
    await this.#write(version, fn, part, keep)
    return this.#connection.run((native, token) => version.commit(native, token))
  }

  /** Gives the lock back, after the versions that were begun. */
  async close () {
    await this.#turn
    this.#native.close()
  }

  [Symbol.asyncDispose] () {
    return this.close()
  }
}

/** A memory block that the app takes part in. */
class Block extends Sent {
  #connection
  /** What the binding has of it; `null` when it was closed. */
  #handle
  /** The arrays' memory, by the place of a view. */
  #memory = new Map()
  #mapping = -1
  #reads = 0
  #layout = { json: null, layout: null, size: undefined }
  /** The layout of the newest read in place, and its mapping. */
  #read = { layout: null, mapping: -1 }

  constructor (connection, native) {
    super()
    this.#connection = connection
    this.#handle = native
    this.id = native.id
    this.pool = native.pool
    // What structuredClone() and postMessage() say instead of making an empty object.
    this.uncloneable = UNCLONEABLE
  }

  get #native () {
    if (this.#handle === null) throw errorOf(this.#closed())
    return this.#handle
  }

  #closed () {
    return own('no_block', `block '${this.id}' was closed here: open it again`, 'no')
  }

  get nbytes () {
    return this.#native.nbytes
  }

  get version () {
    return this.#native.version
  }

  get generation () {
    return this.#native.generation
  }

  get isLive () {
    return this.#native.isLive
  }

  get isMapped () {
    return this.#native.isMapped
  }

  /** The dtype and the shape; `null` without a layout, and where it is not of the block's size. */
  get layout () {
    const json = this.#native.layout
    if (json === null) return null
    if (json !== this.#layout.json) this.#layout = { json, ...readLayout(json) }
    const { layout, size } = this.#layout
    // A block that was resized keeps the layout that it was made with.
    return size === undefined || size === this.nbytes ? layout : null
  }

  get dtype () {
    return this.layout?.dtype ?? null
  }

  get shape () {
    return this.layout?.shape ?? null
  }

  /** By which another thread or process opens it: `app.block(handle)`. */
  get handle () {
    return { id: this.id, pool: this.pool }
  }

  /** What stands for it in the data of a call. */
  reference () {
    return { $block: this.id, pool: this.pool, version: this.version }
  }

  /** Gives it along with the next call. */
  lend (native, isWritable) {
    native.lend(this.#native, isWritable)
  }

  /** All of the newest version in memory of its own, with the version. */
  async #copy () {
    if (this.isMapped) {
      const buffer = new ArrayBuffer(this.nbytes)
      const version = this.#readNow(new Uint8Array(buffer), 0)
      if (version !== null) return { buffer, version }
    }
    const item = await this.#connection.op((native, token) => this.#native.read(native, token))
    if (item.what === ERROR) throw errorOf(item.payload)
    return { buffer: item.payload, version: item.meta }
  }

  #readNow (target, offset) {
    try {
      return this.#native.readNow(target, offset)
    } catch (error) {
      throw thrown(error)
    }
  }

  /**
   * A private copy of the newest version. With `fn`, the version itself is handed to `fn`, and its
   * memory is taken back when `fn` has returned or what it returned has settled. If the version was
   * written over meanwhile, `fn` runs again with the newest.
   */
  async read (fn) {
    if (fn === undefined) return arrayOf((await this.#copy()).buffer, this.layout)
    // It ends a read also where `fn` closed the block.
    const native = this.#native
    for (let runs = 0; runs < RUNS_MAX; runs++) {
      const number = this.#reads++ >>> 0
      const begun = this.#beginRead(number)
      if (begun === null) break
      const [buffer, version, mapping] = begun
      let result
      let error
      let isFailed = false
      try {
        result = await fn(arrayOf(buffer, this.#layoutIn(mapping, buffer)), version)
      } catch (fault) {
        isFailed = true
        error = fault
      }
      // What it saw may have been half of one version and half of another, also if it threw.
      if (!native.endRead(number, buffer)) continue
      if (isFailed) throw error
      return result
    }
    // A copy that is whole, also where writers are faster than `fn`.
    const { buffer, version } = await this.#copy()
    try {
      return await fn(arrayOf(buffer, this.layout), version)
    } finally {
      addon.detach(buffer)
    }
  }

  /** Fills `target` with the newest version; the version. */
  async readInto (target) {
    if (!isBytes(target)) throw new TypeError('a target is an array of numbers or a buffer')
    const isShared = isSharedArrayBuffer(target.buffer ?? target)
    const bytes = ArrayBuffer.isView(target)
      ? new Uint8Array(target.buffer, target.byteOffset, target.byteLength)
      : new Uint8Array(target)
    checkTarget(bytes, this.nbytes)
    if (!isShared && this.isMapped) {
      const version = this.#readNow(bytes, 0)
      if (version !== null) return version
    }
    const { buffer, version } = await this.#copy()
    // The block may have been resized meanwhile.
    checkTarget(bytes, buffer.byteLength)
    bytes.set(new Uint8Array(buffer))
    return version
  }

  /** Some bytes of the newest version. */
  async readAt (offset, length) {
    checkWhole('offset', offset)
    checkWhole('length', length)
    const buffer = await this.#connection.run(
      (native, token) => this.#native.readAt(native, token, offset, length))
    return Buffer.from(buffer)
  }

  /** The layout of a mapping of this number: to ask for it takes longer than to read. */
  #layoutIn (mapping, buffer) {
    if (mapping === this.#read.mapping) return this.#read.layout
    const { layout } = this
    // Not of a generation that came meanwhile.
    if (buffer.byteLength === this.nbytes) this.#read = { layout, mapping }
    return layout
  }

  #beginRead (number) {
    try {
      return this.#native.beginRead(number)
    } catch (error) {
      throw thrown(error)
    }
  }

  /** The newest version in place. */
  async #take () {
    let native
    try {
      native = this.#native.viewNow()
    } catch (error) {
      throw thrown(error)
    }
    return native ?? this.#connection.run((native, token) => this.#native.view(native, token))
  }

  /** The one `ArrayBuffer` of the memory where a view lies; `null` if there can be none. */
  #memoryOf (native) {
    const place = this.#native.place(native)
    if (place === null) return null
    const mapping = Math.floor(place / addon.PLACES)
    if (mapping !== this.#mapping) this.#memory.clear()
    this.#mapping = mapping
    let buffer = this.#memory.get(place) ?? null
    if (buffer === null) {
      buffer = this.#native.memory(native)
      if (buffer !== null) this.#memory.set(place, buffer)
    }
    return buffer
  }

  /** One version in place, for as long as the view is referred to. */
  async view () {
    for (let tries = 0; tries < TRIES_MAX; tries++) {
      const native = await this.#take()
      const { layout } = this
      const shared = this.#memoryOf(native)
      if (shared !== null) return new View(native, layout, shared)
      const buffer = new ArrayBuffer(native.nbytes)
      // False if a writer was faster.
      if (native.copyTo(new Uint8Array(buffer))) return new View(native, layout, buffer)
    }
    throw errorOf(own('contended', `writers of block '${this.id}' were too busy`))
  }

  /**
   * Takes the lock and hands the next version to `fn`; when `fn` has returned, or what it returned
   * has settled, everybody sees it. If `fn` throws, nobody does. The number of the version.
   */
  async write (fn, given) {
    if (typeof fn !== 'function') throw new TypeError('write takes a function')
    const { keep = true, part, waitMs = 1000 } = pick(given, ['keep', 'part', 'waitMs'])
    const draft = await this.#connection.run(
      (native, token) => this.#native.draft(native, token, waitMs))
    await this.#fill(draft, fn, part, keep)
    return this.#connection.run((native, token) => draft.commit(native, token))
  }

  async #fill (native, fn, part, keep) {
    let rows
    try {
      rows = rowsOf(part, this.nbytes, this.layout)
    } catch (error) {
      native.abandon()
      throw error
    }
    const readAt = (offset, length) => this.#connection.run(
      (native, token) => this.#native.readAt(native, token, offset, length))
    await new Draft(native, readAt).fill(fn, rows, keep)
  }

  /** Takes the lock for many versions. */
  async writer (given) {
    const { waitMs = 1000 } = pick(given, ['waitMs'])
    const native = await this.#connection.run(
      (native, token) => this.#native.writer(native, token, waitMs))
    return new Writer(this.#connection, native,
      (version, fn, part, keep) => this.#fill(version, fn, part, keep))
  }

  /** Writes bytes through the server; the version. */
  async writeAt (offset, data, given) {
    checkWhole('offset', offset)
    const { ifVersion } = pick(given, ['ifVersion'])
    const bytes = checkBytes(data)
    return this.#connection.run(
      (native, token) => this.#native.writeAt(native, token, offset, bytes, ifVersion))
  }

  /** Writes `data` where `expected` stands: `undefined`. Else the bytes that stand there. */
  async cas (offset, expected, data) {
    checkWhole('offset', offset)
    const [before, after] = [checkBytes(expected), checkBytes(data)]
    const found = await this.#connection.run(
      (native, token) => this.#native.cas(native, token, offset, before, after))
    return found ?? undefined
  }

  /** Waits for a version newer than `beyond`, or than the one now; the version. */
  async wait (beyond = this.version, given = undefined) {
    checkWhole('beyond', beyond)
    const { timeoutMs, signal } = pick(given, ['timeoutMs', 'signal'])
    const item = await this.#connection.wait(
      (native, token) => this.#native.wait(native, token, beyond, timeoutMs), this, signal)
    if (item.what === ERROR) throw errorOf(item.payload)
    return item.payload
  }

  /** The versions to come: each time the newest of those that came since the last look. */
  changes () {
    const begin = () => this.#connection.run(
      (native, token) => this.#native.changes(native, token))
    const wait = (next) => this.#connection.wait(
      (native, token) => this.#native && next(native, token), this, undefined, OVER)
    return new Inflow(this.#connection, begin, ({ payload }) => payload, wait)
  }

  /** Takes the lock. */
  async lock (given) {
    const { shared = false, waitMs = 1000, leaseMs } = pick(given, ['shared', 'waitMs', 'leaseMs'])
    const native = await this.#connection.run(
      (native, token) => this.#native.lock(native, token, shared, waitMs, leaseMs))
    return new Lock(this.#connection, native)
  }

  /** Gives it another size: a new generation, with which everybody goes on. */
  async resize (nbytes) {
    checkWhole('nbytes', nbytes)
    await this.#connection.run((native, token) => this.#native.resize(native, token, nbytes))
  }

  /** Flushes a persistent block to disk; the version that is there. */
  flush () {
    return this.#connection.run((native, token) => this.#native.flush(native, token))
  }

  /** Removes it, for everybody. */
  async remove () {
    await this.#connection.run((native, token) => this.#native.remove(native, token))
  }

  /** All about it, as the server describes it. */
  info () {
    return this.#connection.run((native, token) => this.#native.info(native, token))
  }

  /** Detaches from the block. */
  close () {
    this.#memory.clear()
    this.#handle?.close()
    this.#handle = null
    this.#connection.endWaits(this, this.#closed())
  }

  [Symbol.dispose ?? Symbol.for('Symbol.dispose')] () {
    this.close()
  }
}

function checkTarget (bytes, nbytes) {
  if (bytes.length === nbytes) return
  throw new TypeError(`the target has ${bytes.length} bytes, and the block has ${nbytes}`)
}

function checkBytes (data) {
  if (typeof data !== 'object' || data === null || !isBytes(data)) {
    throw badRequest('the data is an array of numbers or a buffer')
  }
  return bytesOf(data)
}

/** A block that the handler of a call may write. */
class Writable extends Sent {
  #block

  isWritable = true

  constructor (block) {
    super()
    if (!(block instanceof Block)) throw new TypeError('writable() takes a block')
    this.#block = block
    this.id = block.id
  }

  reference () {
    return this.#block.reference()
  }

  lend (native, isWritable) {
    this.#block.lend(native, isWritable)
  }
}

/** Marks a block in the data of a call: its handler may write it. */
function writable (block) {
  return new Writable(block)
}

module.exports = { Block, blockOptions, writable }
