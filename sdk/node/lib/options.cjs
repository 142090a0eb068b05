'use strict'

// Options, checked before anything is sent.

/** The options that are given, of those that there are. */
function pick (given, allowed) {
  const picked = {}
  if (given === undefined || given === null) return picked
  if (typeof given !== 'object') throw new TypeError('options are an object')
  for (const [name, value] of Object.entries(given)) {
    if (!allowed.includes(name)) {
      throw new TypeError(`there is no option '${name}'; there are ${allowed.join(', ')}`)
    }
    if (value === undefined) continue
    if (name.endsWith('Ms')) checkTime(name, value)
    picked[name] = value
  }
  return picked
}

/** As `pick`, as the JSON text that the binding reads; `undefined` if there are none. */
function options (given, allowed) {
  if (given === undefined || given === null) return undefined
  const picked = pick(given, allowed)
  return Object.keys(picked).length > 0 ? JSON.stringify(picked) : undefined
}

function checkTime (name, value) {
  if (typeof value !== 'number' || !Number.isFinite(value) || value < 0) {
    throw new TypeError(`${name} is a number of milliseconds, not ${String(value)}`)
  }
}

function checkSignal (signal) {
  // Of whatever realm it is.
  const isSignal = typeof signal?.aborted === 'boolean' && typeof signal.addEventListener ===
    'function'
  if (signal !== undefined && !isSignal) {
    throw new TypeError('signal is an AbortSignal')
  }
}

function textOf (value) {
  if (typeof value !== 'string') throw new TypeError(`a name is a string, not ${typeof value}`)
  return value
}

module.exports = { checkSignal, checkTime, options, pick, textOf }
