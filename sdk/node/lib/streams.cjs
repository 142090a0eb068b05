'use strict'

// What comes bit by bit, as async iterables.

const addon = require('./addon.cjs').load()
const { errorOf, own } = require('./errors.cjs')
const { onAbort, pick } = require('./options.cjs')

const {
  Error: ERROR, EndJson: END_JSON, EndExtra: END_EXTRA, Progress: PROGRESS, Over: OVER
} = addon.What

/** Ends what listens to the signal of a stream that is not referred to any more. */
const forgotten = new FinalizationRegistry((off) => off())

const DONE = { done: true, value: undefined }

/** A streamed answer. Not read to its end and not referred to any more, it is cancelled. */
class Stream {
  #connection
  #native
  #signal
  #off
  #last = Promise.resolve()
  #isOver = false

  constructor (connection, native, signal) {
    this.#connection = connection
    this.#native = native
    this.#signal = signal
    this.progress = undefined
    this.end = undefined
    if (signal === undefined) return
    // A signal that lives on does not keep the stream.
    const weak = new WeakRef(native)
    const abort = () => weak.deref()?.close()
    this.#off = onAbort(signal, abort)
    forgotten.register(this, this.#off)
    if (signal.aborted) abort()
  }

  /** The next item. Several may be asked for at a time; they come in order. */
  next () {
    const next = this.#last.then(() => this.#step())
    this.#last = next.catch(() => {})
    return next
  }

  async #step () {
    while (!this.#isOver) {
      let item
      try {
        item = await this.#connection.op((native, token) => this.#native.next(native, token),
          this.#signal)
      } catch (error) {
        this.#close()
        throw error
      }
      switch (item.what) {
        case PROGRESS:
          this.progress = item.payload
          break
        case ERROR:
          this.#close()
          throw errorOf(item.payload)
        case END_JSON:
        case END_EXTRA:
          this.end = item.payload
          this.#close()
          break
        case OVER:
          this.#close()
          break
        default:
          return { done: false, value: item.payload }
      }
    }
    return DONE
  }

  #close () {
    this.#isOver = true
    this.#off?.()
    this.#connection.stop(this.#native)
  }

  /** Cancels the call, if it has not ended. */
  cancel () {
    this.#close()
  }

  async return (value) {
    this.#close()
    return { done: true, value }
  }

  [Symbol.asyncIterator] () {
    return this
  }

  async [Symbol.asyncDispose] () {
    this.#close()
  }
}

/** Events of some kind, one after the other. Not referred to any more, it stops listening. */
class Inflow {
  #connection
  #native
  #read
  #wait
  #last
  #stop
  #isOver = false

  /**
   * `begin` resolves with the source of the binding, `read` makes an event of what it gives, and
   * `wait` runs the operation that waits for it.
   */
  constructor (connection, begin, read, wait = (next) => connection.op(next)) {
    this.#wait = wait
    this.#connection = connection
    this.#read = read
    this.ready = this.#begin(begin)
    // Who does not wait for it gets its error with the first item.
    this.ready.catch(() => {})
    // It ends at once also while the server has not answered.
    this.#last = Promise.race([this.ready, new Promise((resolve) => { this.#stop = resolve })])
    this.#last.catch(() => {})
  }

  async #begin (begin) {
    this.#native = await begin()
    if (this.#isOver) this.#connection.stop(this.#native)
  }

  /** The next one. Several may be asked for at a time; they come in order. */
  next () {
    const next = this.#last.then(() => this.#step())
    this.#last = next.catch(() => {})
    return next
  }

  async #step () {
    if (this.#isOver) return DONE
    const item = await this.#wait((native, token) => this.#native.next(native, token))
    if (item.what === ERROR) throw errorOf(item.payload)
    if (item.what === OVER) {
      this.#isOver = true
      return DONE
    }
    return { done: false, value: this.#read(item) }
  }

  /** Stops listening. */
  async return (value) {
    this.#isOver = true
    this.#stop()
    if (this.#native !== undefined) this.#connection.stop(this.#native)
    return { done: true, value }
  }

  [Symbol.asyncIterator] () {
    return this
  }

  async [Symbol.asyncDispose] () {
    await this.return()
  }
}

/** A call that the server keeps until it is answered. */
class Parked {
  #connection
  #native

  constructor (connection, native) {
    this.#connection = connection
    this.#native = native
    this.id = native.id
  }

  /** Waits for the answer. A signal ends only the wait, which may be repeated. */
  async answer (given) {
    const { signal } = pick(given, ['signal'])
    const item = await this.#connection.op((native, token) => this.#native.answer(native, token),
      signal)
    if (item.what === ERROR) throw errorOf(item.payload)
    return item.payload
  }

  /** Leaves the call, which goes on: its answer goes to `answers()`. */
  leave () {
    this.#end(this.#native.leave(), 'the answer is left to answers()')
  }

  /** Ends the call. */
  cancel () {
    this.#end(this.#native.cancel(), 'the call was cancelled here')
  }

  /** Ends the wait for the answer, if there is one. */
  #end (token, why) {
    this.#connection.endEarly(token, { what: ERROR, meta: 0, payload: own('cancelled', why) })
  }
}

module.exports = { Inflow, Parked, Stream }
