'use strict'

// One connection. Operations of the binding are numbered; their results arrive in batches, one for
// each time that the event loop is woken.

const { basename, extname } = require('node:path')

const { load, mayLoop } = require('./addon.cjs')
const { Block, blockOptions } = require('./block.cjs')
const { Failure, badRequest, errorOf, own, thrown, warn } = require('./errors.cjs')
const { Request, handle } = require('./handlers.cjs')
const { encode, parseExactly } = require('./json.cjs')
const { onAbort, options, pick, textFrom, textOf } = require('./options.cjs')
const { Inflow, Parked, Stream } = require('./streams.cjs')

const addon = load()

const {
  Json: JSON_VALUE, Extra: EXTRA, Error: ERROR, EndExtra: END_EXTRA, Over: OVER,
  RequestJson: REQUEST_JSON, RequestExtra: REQUEST_EXTRA
} = addon.What

const INTERNAL = Symbol('internal')
const UNCLONEABLE = Symbol('an App of latzero: each thread and process connects by itself')
const DAYS = 0x7fffffff

const SEND = [
  'timeoutMs', 'to', 'pool', 'key', 'headers', 'idempotencyKey', 'redeliver', 'attempts', 'id',
  'privileged', 'signal'
]
const EMIT = ['to', 'pool', 'key', 'headers', 'one', 'count', 'privileged']
const SERVE = ['pools', 'strategy', 'concurrency', 'doc', 'schema', 'privileged']
const CONNECT = [
  'pools', 'exclusive', 'takeover', 'rehydrate', 'transient', 'meta', 'reconnect',
  'connectTimeoutMs', 'callTimeoutMs'
]
const OURS = ['bigint', 'strict', 'tracebacks']

/** The result of operations that the end of the app cuts short. */
const CLOSED = { what: ERROR, meta: 0, payload: own('disconnected', 'the app was closed', 'no') }

/** What is done after the code that runs now. */
const SOON = Promise.resolve()

/** Apps that have something pending: they are not collected before that has ended. */
const busy = new Set()

/** The value of an item; throws if it is an error. */
function valueOf (item) {
  if (item.what === ERROR) throw errorOf(item.payload)
  return item.payload
}

/** An emit that arrived. */
function eventOf ({ meta, payload }) {
  const [name, pool, appId, instance, headers, lost] = meta
  return { name, pool, data: payload, origin: { appId, instance }, headers, lost }
}

/** The answer to a parked call. */
function answerOf ({ what, meta, payload }) {
  const [id, pool, lost] = meta
  const isAnswer = what === JSON_VALUE || what === EXTRA
  return {
    id,
    pool,
    lost,
    result () {
      if (!isAnswer) throw errorOf(payload)
      return payload
    }
  }
}

/** A trigger that an app serves. */
class Served {
  #end

  constructor (name, end) {
    this.#end = end
    this.name = name
  }

  async close () {
    await this.#end()
  }

  [Symbol.asyncDispose] () {
    return this.close()
  }
}

/** A function that is called with emits. */
class Subscription {
  #events

  constructor (name, events) {
    this.name = name
    this.#events = events
  }

  async close () {
    await this.#events.return()
  }

  [Symbol.asyncDispose] () {
    return this.close()
  }
}

/** What the parts of the package know of an app. */
class Connection {
  pending = new Map()
  running = new Map()
  triggers = new Map()
  served = new Map()
  /** Operations that wait for versions of blocks, with their blocks. */
  waits = new Map()
  isOpen = true
  hasEnded = false
  #next = 1
  #holds = 0
  #mode = 'auto'
  #timer = setInterval(() => {}, DAYS).unref()
  #parse
  #trigger = 1

  constructor (app, url, json, { bigint = false, strict = false, tracebacks = true }) {
    this.app = app
    this.strict = strict
    this.tracebacks = tracebacks
    this.#parse = bigint ? parseExactly : JSON.parse
    // A binding that kept the app would keep it for ever.
    const weak = new WeakRef(this)
    try {
      this.native = new addon.App(url, json, () => weak.deref()?.drain(), mayLoop())
    } catch (error) {
      clearInterval(this.#timer)
      throw thrown(error)
    }
  }

  /** Resolves when the connection is made. */
  async connect () {
    const connected = this.#wait(0)
    // An address that is wrong is found at once.
    this.drain()
    try {
      valueOf(await connected)
    } catch (error) {
      this.release()
      throw error
    }
    // Not counted as pending: it ends with the app.
    const token = this.#next++
    this.pending.set(token, { resolve: () => this.#ended(), isQuiet: true })
    if (this.native.ended(token)) this.drain()
  }

  hold () {
    if (this.#holds++ > 0) return
    busy.add(this)
    if (this.#mode === 'auto') this.#timer.ref()
  }

  unhold () {
    if (--this.#holds > 0) return
    busy.delete(this)
    if (this.#mode === 'auto') this.#timer.unref()
  }

  setMode (mode) {
    if (!this.isOpen) return
    this.#mode = mode
    if (mode === 'ref') this.#timer.ref()
    else this.#timer.unref()
  }

  #wait (token) {
    return new Promise((resolve) => {
      this.pending.set(token, { resolve })
      this.hold()
    })
  }

  /**
   * Runs an operation, begun by `begin(native, token)`, to its end. It resolves with an item of a
   * batch; its error is made by who awaits it, whose stack it then has.
   */
  op (begin, signal) {
    return new Promise((resolve, reject) => {
      if (signal?.aborted) {
        reject(signal.reason)
        return
      }
      const token = this.#next++
      let isDone
      try {
        isDone = begin(this.native, token)
      } catch (error) {
        reject(thrown(error))
        return
      }
      const entry = { resolve, off: undefined }
      this.pending.set(token, entry)
      this.hold()
      // Nothing ends it any more.
      if (!isDone && !this.isOpen) this.endEarly(token, CLOSED)
      if (signal !== undefined && !isDone) {
        const abort = () => {
          if (!this.pending.delete(token)) return
          this.native.cancel(token)
          this.unhold()
          reject(signal.reason)
        }
        entry.off = onAbort(signal, abort)
      }
      if (isDone) this.drain()
    })
  }

  /** As `op`; its value. */
  async run (begin, signal) {
    return valueOf(await this.op(begin, signal))
  }

  /** As `op`, of `block`: it ends with `atEnd` when the app has ended, and at `endWaits`. */
  async wait (begin, block, signal, atEnd = CLOSED) {
    if (this.hasEnded) return atEnd
    let number
    try {
      return await this.op((native, token) => {
        const isDone = begin(native, token)
        number = token
        this.waits.set(token, { block, atEnd })
        return isDone
      }, signal)
    } finally {
      this.waits.delete(number)
    }
  }

  /** Ends what waits for `block`. */
  endWaits (block, error) {
    for (const [token, one] of [...this.waits]) {
      if (one.block === block) this.endEarly(token, { what: ERROR, meta: 0, payload: error })
    }
  }

  /** Closes a source of the binding, and ends the operation that reads it. */
  stop (source) {
    this.endEarly(source.close(), { what: OVER, meta: 0, payload: undefined })
  }

  /** Ends an operation with `item`, unless `token` is `null`. */
  endEarly (token, item) {
    if (token === null) return
    this.native.cancel(token)
    this.#complete(token, item)
  }

  /** Does what is ready. Nothing of a user's runs before this has returned. */
  drain () {
    const batch = this.#parse(this.native.drain())
    const end = batch.length - 1
    let extras
    for (let i = 0; i < end; i += 4) {
      const token = batch[i]
      const what = batch[i + 1]
      const meta = batch[i + 2]
      let payload = batch[i + 3]
      if (what === EXTRA || what === END_EXTRA || what === REQUEST_EXTRA) {
        extras ??= this.native.extras()
        payload = extras[payload]
      }
      if (what < REQUEST_JSON) {
        this.#complete(token, { what, meta, payload })
      } else if (what <= REQUEST_EXTRA) {
        this.#receive(token, meta, payload)
      } else {
        this.running.get(token)?.cancel()
      }
    }
    if (batch[end]) setImmediate(() => this.isOpen && this.drain())
  }

  #complete (token, item) {
    const entry = this.pending.get(token)
    if (entry === undefined) return
    this.pending.delete(token)
    entry.off?.()
    // The end of the app is waited for without holding anything.
    if (entry.isQuiet !== true) this.unhold()
    entry.resolve(item)
  }

  #receive (number, meta, payload) {
    const trigger = this.triggers.get(meta[0])
    const request = new Request(this, trigger?.name, number, meta)
    if (trigger === undefined) {
      request.fail(new Failure('no_handler', 'the trigger is no longer served here'))
      return
    }
    this.running.set(number, request)
    SOON.then(() => handle(this, request, trigger.handler, payload))
  }

  async serve (name, handler, json) {
    const number = this.#trigger++
    this.triggers.set(number, { name, handler })
    try {
      await this.run((native, token) => native.serve(token, name, number, json))
    } catch (error) {
      this.triggers.delete(number)
      throw error
    }
    this.hold()
    let isOver = false
    const end = () => {
      if (isOver) return false
      isOver = true
      this.unhold()
      const isNewest = this.served.get(name) === end
      if (isNewest) this.served.delete(name)
      // A newer one has its requests.
      else this.triggers.delete(number)
      return isNewest
    }
    const before = this.served.get(name)
    this.served.set(name, end)
    before?.()
    // The app may have ended meanwhile.
    if (this.hasEnded) end()
    return new Served(name, async () => {
      if (!end() || !this.isOpen) return
      try {
        await this.run((native, token) => native.unserve(token, name))
      } finally {
        // Requests may come until then.
        this.triggers.delete(number)
      }
    })
  }

  /** Calls `listener` with each change of the connection. That keeps nothing alive. */
  follow (listener) {
    let states
    try {
      states = this.native.states()
    } catch (error) {
      throw thrown(error)
    }
    const tell = ({ what, payload }) => {
      if (what !== JSON_VALUE) return
      try {
        Promise.resolve(listener(payload)).catch(fails)
      } catch (error) {
        fails(error)
      }
      step()
    }
    const fails = (error) => warn('a listener to the state of an app failed', error)
    const step = () => {
      const token = this.#next++
      const resolve = (item) => SOON.then(() => tell(item))
      this.pending.set(token, { resolve, isQuiet: true })
      if (states.next(this.native, token)) this.drain()
    }
    step()
    return new Subscription('state', { return: () => this.stop(states) })
  }

  /** The app has ended, for whatever reason: nothing of it keeps the process alive any more. */
  #ended () {
    this.hasEnded = true
    for (const [token, { atEnd }] of [...this.waits]) this.endEarly(token, atEnd)
    for (const end of [...this.served.values()]) end()
  }

  /** Releases everything; operations in progress are dropped. */
  release () {
    if (!this.isOpen) return
    this.isOpen = false
    this.drain()
    this.native.release()
    for (const request of this.running.values()) request.cancel()
    this.#ended()
    for (const token of [...this.pending.keys()]) this.#complete(token, CLOSED)
    clearInterval(this.#timer)
  }
}

/** Gives blocks along with the next call, each once. */
function lend (native, blocks) {
  if (blocks.length === 0) return
  const writable = new Set(blocks.filter((block) => block.isWritable).map(({ id }) => id))
  const once = new Map(blocks.map((block) => [block.id, block]))
  for (const [id, block] of once) block.lend(native, writable.has(id))
}

class App {
  #closing

  /** Use `connect`. */
  constructor (key, url, json, ours) {
    if (key !== INTERNAL) throw new TypeError('an app is made by connect()')
    Object.defineProperty(this, INTERNAL, { value: new Connection(this, url, json, ours) })
    this.appId = undefined
    // What structuredClone() and postMessage() say instead of making an empty object.
    this.uncloneable = UNCLONEABLE
  }

  get #connection () {
    return this[INTERNAL]
  }

  /** A call as the binding takes it; blocks in its data are lent to it. */
  #begin (data, given, allowed, start) {
    let signal, json
    // Most calls have no options.
    if (given !== undefined && given !== null) {
      const { signal: theirs, ...rest } = pick(given, allowed)
      signal = theirs
      json = textFrom(rest)
    }
    const blocks = []
    const payload = encode(data, this.#connection.strict, blocks)
    return [(native, token) => {
      lend(native, blocks)
      try {
        return start(native, token, payload, json)
      } finally {
        if (blocks.length > 0) native.unlend()
      }
    }, signal]
  }

  async call (name, data, given) {
    return valueOf(await this.#connection.op(...this.#begin(data, given, SEND,
      (native, token, payload, json) => native.call(token, textOf(name), payload, json, false))))
  }

  async reply (name, data, given) {
    const item = await this.#connection.op(...this.#begin(data, given, SEND,
      (native, token, payload, json) => native.call(token, textOf(name), payload, json, true)))
    return { data: valueOf(item), headers: item.meta }
  }

  async park (name, data, given) {
    const native = await this.#connection.run(...this.#begin(data, given, SEND,
      (native, token, payload, json) => native.park(token, textOf(name), payload, json)))
    return new Parked(this.#connection, native)
  }

  answers () {
    const connection = this.#connection
    const begin = async () => {
      try {
        return connection.native.answers()
      } catch (error) {
        throw thrown(error)
      }
    }
    return new Inflow(connection, begin, answerOf)
  }

  async emit (name, data, given) {
    const json = options(given, EMIT)
    const payload = encode(data, this.#connection.strict)
    const delivered = await this.#connection.run(
      (native, token) => native.emit(token, textOf(name), payload, json))
    return delivered ?? undefined
  }

  stream (name, data, given) {
    const [begin, signal] = this.#begin(data, given, [...SEND, 'window'],
      (native, token, payload, json) => native.stream(textOf(name), payload, json))
    let native
    try {
      native = begin(this.#connection.native)
    } catch (error) {
      throw thrown(error)
    }
    return new Stream(this.#connection, native, signal)
  }

  async serve (name, handler, given) {
    if (typeof handler !== 'function') throw new TypeError('a handler is a function')
    return this.#connection.serve(textOf(name), handler, options(given, SERVE))
  }

  events (name) {
    const connection = this.#connection
    const begin = () => connection.run((native, token) => native.events(token, textOf(name)))
    return new Inflow(connection, begin, eventOf)
  }

  async on (name, listener) {
    if (typeof listener !== 'function') throw new TypeError('a listener is a function')
    const events = this.events(name)
    await events.ready
    const fails = (error) => warn(`a listener to '${name}' failed`, error)
    const listen = async () => {
      for await (const event of events) {
        try {
          // Not awaited: an event does not wait for the listener of the one before.
          Promise.resolve(listener(event)).catch(fails)
        } catch (error) {
          fails(error)
        }
      }
    }
    listen().catch(fails)
    return new Subscription(name, events)
  }

  watch (pool) {
    const connection = this.#connection
    const begin = () => connection.run((native, token) => native.watch(token, textOf(pool)))
    return new Inflow(connection, begin, ({ payload }) => payload)
  }

  async block (name, given) {
    // A handle of a block has its pool.
    const { id, pool } = typeof name === 'object' && name !== null ? name : { id: name }
    const json = blockOptions(pool === undefined ? given : { pool, ...given })
    const native = await this.#connection.run(
      (native, token) => native.block(token, textOf(id), json))
    return new Block(this.#connection, native)
  }

  blocks (pool) {
    return this.#connection.run((native, token) => native.blocks(token, pool && textOf(pool)))
  }

  async join (pool) {
    await this.#connection.run((native, token) => native.join(token, textOf(pool), false))
  }

  async leave (pool) {
    await this.#connection.run((native, token) => native.join(token, textOf(pool), true))
  }

  apps () {
    return this.request({ action: 'app_list' })
  }

  pools () {
    return this.request({ action: 'pool_list' })
  }

  async trigger (pool, name) {
    const info = await this.request({ action: 'pool_info', pool, trigger: name })
    return info.triggers[0] ?? null
  }

  async request (message) {
    const json = encode(message, this.#connection.strict)
    if (typeof json !== 'string') throw badRequest('a request is an object')
    return this.#connection.run((native, token) => native.ask(token, json))
  }

  ping () {
    return this.#connection.run((native, token) => native.ping(token))
  }

  close () {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close () {
    const connection = this.#connection
    if (!connection.isOpen) return
    try {
      await connection.run((native, token) => native.close(token))
    } finally {
      connection.release()
    }
  }

  get instance () {
    const { isOpen, native } = this.#connection
    return isOpen ? native.instance ?? undefined : undefined
  }

  get joined () {
    const { isOpen, native } = this.#connection
    return isOpen ? native.joined : []
  }

  get isConnected () {
    return this.#connection.native.isConnected
  }

  get isStored () {
    return this.#connection.native.isStored
  }

  get lost () {
    return this.#connection.native.lost
  }

  onState (listener) {
    if (typeof listener !== 'function') throw new TypeError('a listener is a function')
    return this.#connection.follow(listener)
  }

  ref () {
    this.#connection.setMode('ref')
    return this
  }

  unref () {
    this.#connection.setMode('unref')
    return this
  }

  [Symbol.asyncDispose] () {
    return this.close()
  }

  [Symbol.for('nodejs.util.inspect.custom')] (depth, { stylize }) {
    const state = !this.#connection.isOpen
      ? 'closed'
      : this.isConnected ? 'connected' : 'disconnected'
    return stylize(`App '${this.appId}' in [${this.joined.join(', ')}], ${state}`, 'special')
  }
}

function addressOf (url) {
  if (url !== undefined && url !== null) return { url: textOf(String(url)), isMade: false }
  if (process.env.LATZERO_URL) return { url: process.env.LATZERO_URL, isMade: false }
  const script = process.argv[1] ?? 'node'
  const name = basename(script, extname(script)).replace(/[^A-Za-z0-9._-]/g, '-') || 'node'
  return { url: `latzero://${name}-${process.pid}`, isMade: true }
}

async function connect (url, given) {
  const address = addressOf(url)
  const { bigint, strict, tracebacks, ...rest } = pick(given, [...CONNECT, ...OURS])
  if (address.isMade) rest.transient = true
  const ours = { bigint, strict, tracebacks }
  const app = new App(INTERNAL, address.url, textFrom(rest) ?? '{}', ours)
  await app[INTERNAL].connect()
  app.appId = app[INTERNAL].native.appId
  return app
}

module.exports = { App, connect }
