'use strict'

// Options and other arguments, checked before anything is sent.

const { setMaxListeners } = require('node:events')
const { inspect } = require('node:util')

const { badRequest } = require('./errors.cjs')
const { encode } = require('./json.cjs')

const WHOLE_MAX = Number.MAX_SAFE_INTEGER
const U32_MAX = 2 ** 32 - 1

function isText (value) {
  return typeof value === 'string'
}

function isTime (value) {
  return typeof value === 'number' && value >= 0 && value <= WHOLE_MAX
}

/** An object that is not of a class such as `Map`; of whatever realm. */
function isPlain (value) {
  if (typeof value !== 'object' || value === null) return false
  const prototype = Object.getPrototypeOf(value)
  return prototype === null || Object.getPrototypeOf(prototype) === null
}

function isInstance (value) {
  return typeof value === 'object' && value !== null && isText(value.appId) &&
    isText(value.instance)
}

function isShape (value) {
  return typeof value === 'number' ||
    (typeof value === 'object' && typeof value?.[Symbol.iterator] === 'function')
}

function isSignal (value) {
  return typeof value?.aborted === 'boolean' && typeof value.addEventListener === 'function'
}

function whole (min, max = WHOLE_MAX) {
  return {
    what: `a whole number from ${min} to ${max}`,
    is: (value) => Number.isSafeInteger(value) && value >= min && value <= max
  }
}

// What an option may be.
const ANY = { what: 'anything', is: () => true }
const FLAG = { what: 'true or false', is: (value) => typeof value === 'boolean' }
const TEXT = { what: 'a string', is: isText }
const TEXTS = {
  what: 'an array of strings',
  is: (value) => Array.isArray(value) && value.every(isText)
}
const TIME = { what: `a number of milliseconds from 0 to ${WHOLE_MAX}`, is: isTime }
const SIZE = whole(0)

/** All options of all methods: the same name means the same everywhere. */
const KINDS = {
  attempts: whole(1, U32_MAX),
  bigint: FLAG,
  callTimeoutMs: TIME,
  concurrency: whole(0, U32_MAX),
  connectTimeoutMs: {
    what: 'a number of milliseconds above 0',
    is: (value) => isTime(value) && value > 0
  },
  consistency: TEXT,
  count: FLAG,
  create: { what: "false, true or 'new'", is: (value) => FLAG.is(value) || value === 'new' },
  doc: TEXT,
  dtype: ANY,
  exclusive: FLAG,
  headers: {
    what: 'a plain object whose values are strings',
    is: (value) => isPlain(value) && Object.values(value).every(isText)
  },
  id: TEXT,
  idempotencyKey: TEXT,
  ifVersion: SIZE,
  keep: FLAG,
  key: TEXT,
  kind: TEXT,
  leaseMs: TIME,
  lifetime: TEXT,
  meta: ANY,
  one: FLAG,
  part: {
    what: 'an array [start, end]',
    is: (value) => Array.isArray(value) && value.length === 2
  },
  pool: TEXT,
  pools: TEXTS,
  privileged: FLAG,
  readableBy: TEXTS,
  reconnect: FLAG,
  redeliver: FLAG,
  rehydrate: FLAG,
  schema: ANY,
  shape: { what: 'a length or an array of lengths', is: isShape },
  shared: FLAG,
  signal: { what: 'an AbortSignal', is: isSignal },
  size: SIZE,
  slots: whole(1, U32_MAX),
  strategy: TEXT,
  strict: FLAG,
  takeover: FLAG,
  timeoutMs: TIME,
  to: {
    what: 'an AppID, or an object with the strings `appId` and `instance`',
    is: (value) => isText(value) || isInstance(value)
  },
  tracebacks: FLAG,
  transient: FLAG,
  waitMs: TIME,
  window: whole(1),
  writableBy: TEXTS,
  write: FLAG
}

function refuse (name, value, { what }) {
  const shown = inspect(value, { depth: 0, maxArrayLength: 4, maxStringLength: 40 })
  throw new TypeError(`${name} is ${what}, not ${shown}`)
}

/** Checks the value of an option. */
function check (name, value) {
  const kind = KINDS[name]
  if (!kind.is(value)) refuse(name, value, kind)
  return value
}

/** Checks an offset, a number of bytes or a version. */
function checkWhole (name, value) {
  if (!SIZE.is(value)) refuse(name, value, SIZE)
  return value
}

/** The options that are given, of those that there are. */
function pick (given, allowed) {
  const picked = {}
  if (given === undefined || given === null) return picked
  if (typeof given !== 'object' || Array.isArray(given)) {
    throw new TypeError('options are an object')
  }
  for (const name of Object.keys(given)) {
    if (!allowed.includes(name)) {
      throw new TypeError(`there is no option '${name}'; there are ${allowed.join(', ')}`)
    }
  }
  // An object of a class has them too.
  for (const name of allowed) {
    const value = given[name]
    if (value !== undefined) picked[name] = check(name, value)
  }
  return picked
}

/** Options as the JSON text that the binding reads; `undefined` if there are none. */
function textFrom (picked) {
  return Object.keys(picked).length > 0 ? encode(picked, false, null, 'options') : undefined
}

/** As `pick`, as JSON text. */
function options (given, allowed) {
  return textFrom(pick(given, allowed))
}

function textOf (value) {
  if (!isText(value)) throw new TypeError(`a name is a string, not ${typeof value}`)
  if (!value.isWellFormed()) {
    throw badRequest(`'${value.toWellFormed()}': lone surrogates cannot be sent`)
  }
  return value
}

/** Calls `abort` when `signal` fires; what ends that. */
function onAbort (signal, abort) {
  // One signal may be for any number of calls: that is no leak, of which Node would warn.
  if (signal instanceof EventTarget) setMaxListeners(0, signal)
  signal.addEventListener('abort', abort, { once: true })
  return () => signal.removeEventListener('abort', abort)
}

module.exports = { check, checkWhole, onAbort, options, pick, refuse, textFrom, textOf }
