'use strict'

// Functions as handlers: what they get, what they answer, and items that they stream.

const addon = require('./addon.cjs').load()
const { LatZeroError, describe, errorOf, own, text, thrown, warn } = require('./errors.cjs')
const { encode, mend, withBlocks } = require('./json.cjs')

const { Error: ERROR, Over: OVER } = addon.What

/** The codes with which sending an item fails once the caller is gone. */
const GONE = ['cancelled', 'disconnected']

/** The value of `orGone` when the caller is gone. */
const LEFT = Symbol('left')

/** What a handler answers. The caller's request is not to blame if that can't be encoded. */
function encodeAnswer (data, strict) {
  try {
    return encode(data, strict)
  } catch (error) {
    if (!(error instanceof LatZeroError)) throw error
    throw new TypeError(`the answer can't be sent: ${error.message}`, { cause: error })
  }
}

/** A call as its handler sees it. */
class Request {
  #connection
  #number
  #info
  #controller
  #gone
  #isOver = false
  #blocks

  constructor (connection, name, number, meta) {
    const [, pool, appId, instance, isEmit, blocks, lost] = meta
    this.#connection = connection
    this.#number = number
    this.#blocks = blocks
    this.name = name
    this.pool = pool
    this.origin = { appId, instance }
    this.isEmit = isEmit
    this.lost = lost
    this.cancelled = false
  }

  /** What few handlers ask for; as it was when it was first asked for. */
  #ask () {
    if (this.#info === undefined) {
      const info = this.#connection.native.requestInfo(this.#number)
      if (info === null) throw new Error('the call has ended: read this before it is answered')
      this.#info = JSON.parse(info)
    }
    return this.#info
  }

  get app () {
    return this.#connection.app
  }

  get headers () {
    return this.#ask().headers
  }

  get key () {
    return this.#ask().key
  }

  get attempt () {
    return this.#ask().attempt
  }

  /** What is left of the call's time, in milliseconds; `null` for an emit. */
  get timeLeftMs () {
    const info = this.#connection.native.requestInfo(this.#number)
    return info === null ? 0 : JSON.parse(info).timeLeftMs
  }

  /** Fires when the caller does not want the answer any more. */
  get signal () {
    if (this.#controller === undefined) {
      this.#controller = new AbortController()
      if (this.cancelled) this.#controller.abort(this.#reason())
    }
    return this.#controller.signal
  }

  #reason () {
    return errorOf(own('cancelled', 'the caller does not want the answer any more'))
  }

  // Getters, so that handlers may take these functions out of the request.

  /** Reports how far the work is. */
  get progress () {
    return async (report) => { await this.send(report, true) }
  }

  /** A block that came with the call, for as long as the call lasts. */
  get block () {
    return (id) => {
      const { Block } = require('./block.cjs')
      try {
        return new Block(this.#connection, this.#connection.native.requestBlock(this.#number, id))
      } catch (error) {
        throw thrown(error)
      }
    }
  }

  /** The payload, with blocks in the places of their references. */
  arrived (payload) {
    return this.#blocks.length > 0
      ? withBlocks(payload, this.#blocks, this.block)
      : payload
  }

  /** Sends an item or a report; whether anybody waits for more. What can't be sent is thrown. */
  async send (data, isReport) {
    const { strict } = this.#connection
    const payload = isReport ? encode(data, strict) : encodeAnswer(data, strict)
    const { what, payload: fault } = await this.#connection.op(
      (native, token) => native.partial(token, this.#number, payload, isReport))
    if (what === ERROR && !GONE.includes(fault.code)) throw errorOf(fault)
    return what !== ERROR && what !== OVER
  }

  /** The caller is gone. */
  cancel () {
    if (this.cancelled || this.#isOver) return
    this.cancelled = true
    this.#connection.running.delete(this.#number)
    // What listens runs when the batch is done.
    queueMicrotask(() => {
      this.#controller?.abort(this.#reason())
      this.#gone?.()
    })
  }

  /** As `promise`, or `LEFT` when the caller is gone. */
  orGone (promise) {
    return new Promise((resolve, reject) => {
      this.#gone = () => resolve(LEFT)
      if (this.cancelled) this.#gone()
      Promise.resolve(promise).then(resolve, reject)
    })
  }

  answer (data) {
    const { native, strict } = this.#connection
    native.answer(this.#number, encodeAnswer(data, strict))
    this.#end()
  }

  fail (error) {
    const { native, strict, tracebacks } = this.#connection
    const { code, message, data } = describe(error, tracebacks)
    let json = null
    let note = ''
    try {
      if (data !== null && data !== undefined) json = mend(data, strict)
    } catch (fault) {
      note = ` (its data can't be sent: ${text(() => fault.message)})`
    }
    native.fail(this.#number, code.toWellFormed(), (message + note).toWellFormed(), json)
    this.#end()
  }

  #end () {
    this.#isOver = true
    this.#connection.running.delete(this.#number)
  }
}

/** The iterator of a result that is a stream; `undefined` if it is none. */
function iteratorOf (result) {
  if (typeof result !== 'object' || result === null) return undefined
  if (typeof result[Symbol.asyncIterator] === 'function') return result[Symbol.asyncIterator]()
  // A generator, and not a list.
  const isIterator = typeof result.next === 'function'
  return isIterator && typeof result[Symbol.iterator] === 'function' ? result : undefined
}

/** Closes an iterator before its end. What that throws, the caller does not hear. */
async function close (iterator, { name }) {
  try {
    await iterator.return?.()
  } catch (error) {
    warn(`a handler of '${name}' failed when its stream was closed`, error)
  }
}

/** Streams what an iterator gives; what it returned is the end. */
async function stream (request, iterator) {
  let isOver = false
  try {
    for (;;) {
      const next = await request.orGone(iterator.next())
      if (next === LEFT) return undefined
      if (typeof next !== 'object' || next === null) {
        throw new TypeError('next() of an iterator gives an object')
      }
      if (next.done) {
        isOver = true
        return next.value
      }
      // A plain generator may yield promises, as in `for await`.
      const isPromise = typeof next.value?.then === 'function'
      const value = isPromise ? await request.orGone(next.value) : next.value
      if (value === LEFT || !await request.send(value, false)) return undefined
    }
  } finally {
    // Not awaited: a generator that waits itself returns after that. It has `signal` to end it.
    if (!isOver) close(iterator, request)
  }
}

/** Runs a handler. */
async function handle (connection, request, handler, payload) {
  try {
    let result = await handler(request.arrived(payload), request)
    const iterator = iteratorOf(result)
    if (iterator !== undefined) result = await stream(request, iterator)
    if (!request.cancelled) request.answer(result)
  } catch (error) {
    // Nobody else would hear of it.
    if (request.isEmit) warn(`a handler of '${request.name}' failed at an emit`, error)
    if (!request.cancelled) request.fail(error)
  }
}

module.exports = { Request, handle }
