'use strict'

// JSON as LatZero has it: integers of 64 bits by `bigint`, blocks by reference, and bytes only as
// a whole payload.

const { randomUUID } = require('node:crypto')
const {
  isAnyArrayBuffer, isDate, isNumberObject, isSharedArrayBuffer
} = require('node:util').types

const { badRequest } = require('./errors.cjs')

/** How many levels data may nest. */
const LEVELS_MAX = 128
const INTEGER_MIN = -(2n ** 63n)
const INTEGER_MAX = 2n ** 64n - 1n
/** As long as the longest of them; a longer text need not be read as an integer. */
const INTEGER_CHARS_MAX = 20

// What a `bigint` is while `JSON.stringify` runs. Nobody else can know it.
const MARK = `bigint-${randomUUID()}:`
const MARKED = new RegExp(`"${MARK}(-?[0-9]+)"`, 'g')

/** Where blocks of the data that is being written go: an array, or `null` where none may be. */
let lent

/** Whether lone surrogates are written all the same, as escapes. */
let mends = false
/** An escape of `JSON.stringify`: of a lone surrogate, or of something else. */
const ESCAPE = /\\(ud[0-9a-f]{3}|.)/g

function isSendable (integer) {
  return integer >= INTEGER_MIN && integer <= INTEGER_MAX
}

function isBytes (value) {
  return ArrayBuffer.isView(value) || isAnyArrayBuffer(value)
}

/** What can't be sent, as far as `value` alone says; `undefined` if it can. */
function fault (value, strict) {
  if (typeof value === 'string') {
    return value.isWellFormed() || mends ? undefined : 'lone surrogates cannot be sent'
  }
  if (typeof value === 'bigint' && !isSendable(value)) {
    return 'integers are from -2^63 to 2^64-1'
  }
  if (strict && (typeof value === 'number' || isNumberObject(value)) &&
    !Number.isFinite(Number(value))) {
    return 'NaN and infinities are not JSON'
  }
  if (typeof value === 'object' && value !== null && isBytes(value)) {
    return 'bytes do not go inside JSON: send them whole, or as a block'
  }
  return undefined
}

/** The path of what `holder` has by the name `key`. */
function within (path, holder, key) {
  return Array.isArray(holder) ? `${path}[${key}]` : `${path}.${key}`
}

/** What `JSON.stringify` writes for a string or an integer that is an object. */
function unboxed (value) {
  return value instanceof String || value instanceof BigInt ? value.valueOf() : value
}

/** Where in `value` the first fault that `scan` finds is, as a path. */
function place (given, strict, path) {
  const value = unboxed(given)
  if (fault(value, strict) !== undefined) return path
  if (typeof value !== 'object' || value === null) return undefined
  if (!Array.isArray(value) && typeof value.toJSON === 'function') return undefined
  for (const key of Object.keys(value)) {
    const inside = within(path, value, key)
    const found = fault(key) === undefined ? place(value[key], strict, inside) : inside
    if (found !== undefined) return found
  }
  return undefined
}

/** What can't be sent, and where it is if that is known already. */
class Fault extends Error {
  constructor (why, path) {
    super(why)
    this.path = path
  }
}

function check (value, strict) {
  const why = fault(value, strict)
  if (why !== undefined) throw new Fault(why)
}

/** Checks what `JSON.stringify` would write otherwise; whether it takes the slow way. */
function scan (value, strict, levels) {
  switch (typeof value) {
    case 'bigint':
      check(value, strict)
      return true
    case 'number':
      if (strict) check(value, strict)
      return false
    case 'string':
      check(value)
      return false
    case 'object':
      break
    default:
      return false
  }
  if (value === null) return false
  if (unboxed(value) !== value) return scan(unboxed(value), strict, levels)
  if (levels === 0) throw badRequest(`data is deeper than ${LEVELS_MAX} levels, or contains itself`)
  let isSlow = false
  if (Array.isArray(value)) {
    for (let i = 0; i < value.length; i++) {
      if (scan(value[i], strict, levels - 1)) isSlow = true
    }
    return isSlow
  }
  check(value, strict)
  if (typeof value.toJSON === 'function') return !(isDate(value) || value instanceof Sent)
  for (const key of Object.keys(value)) {
    check(key)
    if (scan(value[key], strict, levels - 1)) isSlow = true
  }
  return isSlow
}

/** What `JSON.stringify` asks for each value, where there may be more than JSON has. */
function replacer (strict) {
  // The way from the whole data to `value`, as what `toJSON` returned: it holds what comes next.
  const trail = []
  return function (key, given) {
    const [original, value] = [unboxed(this[key]), unboxed(given)]
    while (trail.length > 0 && trail[trail.length - 1].value !== this) trail.pop()
    trail.push({ key, value })
    for (const one of [key, original, value]) {
      const why = fault(one, strict)
      if (why !== undefined) throw new Fault(why, pathOf(trail))
    }
    if (typeof original === 'bigint') return MARK + original
    return typeof value === 'bigint' ? MARK + value : value
  }
}

function pathOf (trail) {
  let path = ''
  for (let i = 1; i < trail.length; i++) path = within(path, trail[i - 1].value, trail[i].key)
  return path
}

/** Something that writes itself as a reference: a block. */
class Sent {
  toJSON () {
    const reference = this.reference()
    if (lent === null) throw badRequest('a block goes along with a call, and with nothing else')
    lent?.push(this)
    return reference
  }
}

function writeJson (data, strict) {
  const isSlow = scan(data, strict, LEVELS_MAX)
  const json = isSlow ? JSON.stringify(data, replacer(strict)) : JSON.stringify(data)
  if (json === undefined) throw badRequest(`a ${typeof data} is not data`)
  return isSlow ? json.replace(MARKED, '$1') : json
}

/**
 * A payload as the binding takes it: JSON text, or bytes. Blocks in it are put into `blocks`, and
 * `root` is what messages call it.
 */
function encode (data, strict, blocks = null, root = 'data') {
  if (data === undefined || data === null) return 'null'
  if (typeof data === 'object' && isBytes(data)) return bytesOf(data)
  const before = lent
  lent = blocks
  try {
    return writeJson(data, strict)
  } catch (error) {
    if (!(error instanceof Fault)) throw error
    const path = root + (error.path ?? place(data, strict, '') ?? '')
    throw badRequest(`${path.toWellFormed()}: ${error.message}`)
  } finally {
    lent = before
  }
}

/** As `encode`, of the data of an error: with replacement characters for lone surrogates. */
function mend (data, strict) {
  mends = true
  try {
    const json = encode(data, strict)
    if (typeof json !== 'string') throw badRequest('bytes are no data of errors')
    return json.replace(ESCAPE, (escape, { length }) => length > 1 ? '\ufffd' : escape)
  } finally {
    mends = false
  }
}

/** Bytes as an array that no other thread has. */
function bytesOf (data) {
  const bytes = ArrayBuffer.isView(data)
    ? new Uint8Array(data.buffer, data.byteOffset, data.byteLength)
    : new Uint8Array(data)
  return isSharedArrayBuffer(bytes.buffer) ? new Uint8Array(bytes) : bytes
}

const LONG_NUMBER = /[0-9]{16}/
const NUMBER = /-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?/y

/** As `JSON.parse`, with integers that can be sent and a number can't hold exactly as `bigint`. */
function parseExactly (text) {
  if (!LONG_NUMBER.test(text)) return JSON.parse(text)
  let at = 0

  function parseString () {
    const start = at++
    for (;;) {
      const end = text.indexOf('"', at)
      let escapes = 0
      while (text[end - 1 - escapes] === '\\') escapes++
      at = end + 1
      if (escapes % 2 === 0) return JSON.parse(text.slice(start, at))
    }
  }

  function skip (word, value) {
    at += word.length
    return value
  }

  function parseNumber () {
    NUMBER.lastIndex = at
    const [whole, fraction, exponent] = NUMBER.exec(text)
    at = NUMBER.lastIndex
    const number = Number(whole)
    const isInteger = fraction === undefined && exponent === undefined
    if (!isInteger || Number.isSafeInteger(number) || whole.length > INTEGER_CHARS_MAX) {
      return number
    }
    const exact = BigInt(whole)
    // As a `bigint` it could not be sent back.
    return isSendable(exact) ? exact : number
  }

  function blank () {
    while (text[at] === ' ' || text[at] === '\n' || text[at] === '\r' || text[at] === '\t') at++
  }

  function parseValue () {
    blank()
    switch (text[at]) {
      case '"': return parseString()
      case '{': return parseObject()
      case '[': return parseList()
      case 't': return skip('true', true)
      case 'f': return skip('false', false)
      case 'n': return skip('null', null)
      default: return parseNumber()
    }
  }

  function parseList () {
    const list = []
    at++
    blank()
    while (text[at] !== ']') {
      list.push(parseValue())
      blank()
      if (text[at] === ',') at++
      blank()
    }
    at++
    return list
  }

  function parseObject () {
    const object = {}
    at++
    blank()
    while (text[at] !== '}') {
      const key = parseString()
      blank()
      at++
      const value = parseValue()
      // `__proto__` is a key like any other.
      if (key === '__proto__') {
        Object.defineProperty(object, key, {
          value, writable: true, enumerable: true, configurable: true
        })
      } else {
        object[key] = value
      }
      blank()
      if (text[at] === ',') at++
      blank()
    }
    at++
    return object
  }

  return parseValue()
}

/** Data with the blocks of `ids` in the places of their references. */
function withBlocks (data, ids, block) {
  if (typeof data !== 'object' || data === null) return data
  if (!Array.isArray(data) && ids.includes(data.$block)) return block(data.$block)
  for (const key of Object.keys(data)) {
    const value = data[key]
    if (typeof value === 'object' && value !== null) data[key] = withBlocks(value, ids, block)
  }
  return data
}

module.exports = { Sent, bytesOf, encode, isBytes, mend, parseExactly, withBlocks }
