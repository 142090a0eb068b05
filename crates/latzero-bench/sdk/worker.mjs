// One process of `cargo xtask bench sdk` in Node: a caller or a handler; see `worker.py`.
//
//     worker.mjs KIND ADDRESS TRIGGER

import { connect as dial } from 'node:net'
import { createRequire } from 'node:module'
import { createInterface } from 'node:readline'

// The package as it lies in this checkout.
const { connect } = createRequire(import.meta.url)('../../../sdk/node/lib/index.cjs')

const DATA = { id: 1234, name: 'sensor-a', values: [1.5, 2.5, 3.5], ok: true }
const POOL = 'bench'
const clock = process.hrtime.bigint

const say = (answer) => process.stdout.write(
  (typeof answer === 'string' ? answer : JSON.stringify(answer)) + '\n')
const median = (times) => Number(times.sort((a, b) => Number(a - b))[times.length >> 1])
const rate = (calls, begin) => ({ per_second: calls / Number(clock() - begin) * 1e9 })

async function oneAtATime ({ warmup, calls }, call) {
  for (let i = 0; i < warmup; i++) await call()
  const times = []
  for (let i = 0; i < calls; i++) {
    const begin = clock()
    await call()
    times.push(clock() - begin)
  }
  return { p50_ns: median(times) }
}

/** Keeps calls in flight, each by a function that makes one after another. */
async function inFlight ({ warmup, calls, window }, call) {
  const turns = (count) => Promise.all(Array.from({ length: window }, async () => {
    for (let i = 0; i < count / window; i++) await call()
  }))
  await turns(warmup)
  const begin = clock()
  await turns(calls)
  return rate(calls, begin)
}

async function obey (call) {
  const lines = createInterface({ input: process.stdin })
  say('ready')
  for await (const line of lines) {
    const order = JSON.parse(line)
    say(await (order.load === 'in_flight' ? inFlight : oneAtATime)(order, call))
  }
  process.exit(0)
}

const url = (path, app) => `latzero://${app}?socket=${path}&pool=${POOL}`

async function caller (path, trigger) {
  const app = await connect(url(path, 'node-caller'), { transient: true })
  await obey(() => app.call(trigger, DATA))
}

async function handler (path, trigger) {
  const app = await connect(url(path, `serves-${trigger}`), { transient: true })
  await app.serve(trigger, (data) => data)
  say('ready')
}

// A client as one writes it by hand: frames of JSON, answers found by their ids, errors thrown.

function frame (message) {
  const text = Buffer.from(JSON.stringify(message))
  const bytes = Buffer.allocUnsafe(text.length + 4)
  bytes.writeUInt32BE(text.length)
  text.copy(bytes, 4)
  return bytes
}

/** A connection whose messages go to `receive`. */
function bare (path, app, triggers, receive) {
  const socket = dial(path)
  let received = Buffer.alloc(0)
  socket.on('data', (data) => {
    received = received.length === 0 ? data : Buffer.concat([received, data])
    let start = 0
    while (received.length >= start + 4) {
      const end = start + 4 + received.readUInt32BE(start)
      if (received.length < end) break
      receive(JSON.parse(received.toString('utf8', start + 4, end)), socket)
      start = end
    }
    received = received.subarray(start)
  })
  socket.write(frame({ action: 'handshake', app_id: app, pools: [POOL], triggers }))
  return socket
}

async function bareCaller (path, trigger) {
  const pending = new Map()
  let next = 0
  const socket = await new Promise((resolve) => {
    bare(path, 'bare-node', [], (message, socket) => {
      if (message.action === 'handshake_ack') {
        resolve(socket)
        return
      }
      const call = pending.get(message.in_reply_to)
      if (call === undefined) return
      pending.delete(message.in_reply_to)
      if (message.status === 'error') call.reject(new Error(message.error.message))
      else call.resolve(message.response)
    })
  })
  await obey(() => new Promise((resolve, reject) => {
    const id = String(++next)
    pending.set(id, { resolve, reject })
    socket.write(frame({ action: 'trigger', id, process: trigger, data: DATA, ttl: 30_000 }))
  }))
}

function bareHandler (path, trigger) {
  bare(path, `serves-${trigger}`, [trigger], (message, socket) => {
    if (message.action === 'handshake_ack') say('ready')
    if (message.action !== 'trigger') return
    socket.write(frame({
      action: 'response', in_reply_to: message.id, status: 'ok', response: message.data
    }))
  })
}

/** Views of blocks; an order names one of the measurements. */
async function blockCaller (path) {
  const app = await connect(url(path, 'node-block-caller'), { transient: true })
  const small = await app.block('small', { shape: 8 << 20, dtype: 'u1', create: true })
  await small.write((array) => { array.fill(7) }, { keep: false })
  const view = await small.view()
  const huge = await app.block('node-huge', { shape: 1 << 30, dtype: 'u1', create: true })
  await huge.write((array) => { array[0] = 1 }, { keep: false, part: [0, 4096] })
  let opened
  const measures = {
    array: () => view.array(),
    read: () => small.read((array) => array[0]),
    first: () => opened.view()
  }
  const lines = createInterface({ input: process.stdin })
  say('ready')
  for await (const line of lines) {
    const { load, warmup, calls } = JSON.parse(line)
    const act = measures[load]
    const times = []
    for (let i = 0; i < warmup + calls; i++) {
      // A block that was viewed has its memory at hand.
      if (load === 'first') opened = await app.block('node-huge')
      const begin = clock()
      const result = act()
      if (load !== 'array') await result
      if (i >= warmup) times.push(clock() - begin)
    }
    say({ p50_ns: median(times) })
  }
  process.exit(0)
}

const kinds = { caller, handler, bareCaller, bareHandler, blockCaller }
await kinds[process.argv[2]](...process.argv.slice(3))
