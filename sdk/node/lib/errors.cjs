'use strict'

// The errors: one class per family of error codes, and what a handler that threw answers.

const { isNativeError } = require('node:util').types

const addon = require('./addon.cjs').load()

const TRACEBACK_BYTES_MAX = 16 * 1024

class LatZeroError extends Error {
  constructor (code, message, { ran = null, data = null, hint = null } = {}) {
    super(message)
    this.code = code
    this.ran = ran
    this.data = data
    this.hint = hint
  }

  get name () {
    return this.constructor.name
  }

  get retryable () {
    return this.ran === 'no' && this instanceof UnavailableError
  }
}

class UnavailableError extends LatZeroError {}
class TimeoutError extends LatZeroError {}
class CancelledError extends LatZeroError {}
class DisconnectedError extends LatZeroError {}
class ForbiddenError extends LatZeroError {}
class BadRequestError extends LatZeroError {}
class BlockError extends LatZeroError {}
class ServerFailedError extends LatZeroError {}
class CryptoFailedError extends LatZeroError {}

class HandlerFailedError extends LatZeroError {
  constructor (code, message, more) {
    super(code, message, more)
    if (this.remoteTraceback !== null) {
      // Shown below this error, as the reason that it is.
      const cause = new Error(message)
      cause.name = this.type ?? 'Error'
      cause.stack = this.remoteTraceback
      Object.defineProperty(this, 'cause', { value: cause, writable: true, configurable: true })
    }
  }

  get type () {
    return ofException(this.data, 'type')
  }

  get remoteTraceback () {
    return ofException(this.data, 'traceback')
  }
}

function ofException (data, key) {
  const value = typeof data === 'object' && data !== null ? data[key] : undefined
  return typeof value === 'string' ? value : null
}

/** Thrown by a handler to answer with a code of its own. */
class Failure extends Error {
  constructor (code, message = '', data = null) {
    super(message)
    this.code = String(code)
    this.data = data
  }

  get name () {
    return 'Failure'
  }
}

const classes = {
  UnavailableError,
  TimeoutError,
  CancelledError,
  DisconnectedError,
  HandlerFailedError,
  ForbiddenError,
  BadRequestError,
  BlockError,
  ServerFailedError,
  CryptoFailedError
}

/** The error that the binding describes. */
function errorOf ({ family, code, message, ran, data, hint }) {
  return new classes[`${family}Error`](code, message, { ran, data, hint })
}

const table = new Map(addon.codes().map(([code, family, hint]) => [code, { family, hint }]))

/** An error of this library, described as the binding describes its own. */
function own (code, message, ran = null) {
  return { ...table.get(code), code, message, ran, data: null }
}

/** What the binding threw: its own errors are descriptions of the client's. */
function thrown (error) {
  if (error.code === 'InvalidArg') return new TypeError(error.message)
  if (error.code !== 'GenericFailure' || !error.message.startsWith('{')) return error
  return errorOf(JSON.parse(error.message))
}

/** A refusal of this library, before anything was sent. */
function badRequest (message) {
  return errorOf(own('bad_message', message, 'no'))
}

/** What `read` gives; `undefined` if it throws: anything can be thrown, also what can't be read. */
function tried (read) {
  try {
    return read()
  } catch {
    return undefined
  }
}

function text (read) {
  return tried(() => String(read())) ?? 'an object without text'
}

/** Code, message and data of the answer of a handler that threw `error`. */
function describe (error, tracebacks) {
  if (tried(() => error instanceof Failure)) {
    return {
      code: text(() => error.code),
      message: text(() => error.message),
      data: tried(() => error.data)
    }
  }
  const isError = isNativeError(error) || tried(() => error instanceof Error)
  const type = isError ? text(() => error.constructor?.name || error.name) : typeof error
  const message = text(() => isError ? error.message : error)
  const data = { type, message }
  const stack = isError ? tried(() => error.stack) : undefined
  if (tracebacks && typeof stack === 'string') {
    const bytes = Buffer.from(stack)
    data.traceback = bytes.length > TRACEBACK_BYTES_MAX
      ? bytes.toString('utf8', 0, TRACEBACK_BYTES_MAX)
      : stack
  }
  return { code: 'handler_error', message: `${type}: ${message}`, data }
}

/** Reports an error that no caller receives, as a process warning. */
function warn (message, error) {
  const stack = tried(() => error?.stack)
  const detail = typeof stack === 'string' ? stack : text(() => error)
  process.emitWarning(message, { type: 'LatZeroWarning', detail })
}

module.exports = {
  LatZeroError,
  ...classes,
  Failure,
  badRequest,
  describe,
  errorOf,
  own,
  text,
  thrown,
  warn
}
