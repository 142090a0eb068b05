// The peer of the shared scenarios in Node: it reads one command per line and writes one answer per
// line. The commands are listed in conformance/scenarios/README.md. It uses only public names.

import { createInterface } from 'node:readline'
import { setTimeout as pause } from 'node:timers/promises'

import {
  Failure, HandlerFailedError, LatZeroError, CancelledError, connect, writable
} from 'latzero'

const LONG_MS = 3_600_000
/** How often a handler looks whether it was released. */
const LOOK_MS = 2

/** What commands and handlers share. */
class Board {
  notes = new Map()
  permits = new Map()
  isOver = false

  of (name) {
    if (!this.notes.has(name)) this.notes.set(name, [])
    return this.notes.get(name)
  }

  release (name) {
    this.permits.set(name, (this.permits.get(name) ?? 0) + 1)
  }

  /** Waits for `release`; whether that came before the end. */
  async wait (name, request) {
    for (;;) {
      const permits = this.permits.get(name) ?? 0
      if (permits > 0) {
        this.permits.set(name, permits - 1)
        return true
      }
      if (this.isOver || request?.cancelled) return false
      await pause(LOOK_MS)
    }
  }
}

let board = new Board()
const apps = new Map()
const blocks = new Map()
const things = new Map()

function take (name) {
  const thing = things.get(name)
  things.delete(name)
  return thing
}

const tags = {
  $bytes: (digits) => Buffer.from(digits, 'hex'),
  $int: (digits) => BigInt(digits),
  $float: (name) => ({ nan: NaN, inf: Infinity, '-inf': -Infinity })[name],
  $block: (name) => blocks.get(name),
  $writable: (name) => writable(blocks.get(name)),
  $nested (depth) {
    let nested = []
    for (let i = 1; i < depth; i++) nested = [nested]
    return nested
  }
}

/** A value of a command; tags become what they stand for. */
function read (value) {
  if (Array.isArray(value)) return value.map(read)
  if (typeof value !== 'object' || value === null) return value
  const entries = Object.entries(value)
  if (entries.length === 1 && tags[entries[0][0]] !== undefined) {
    return tags[entries[0][0]](entries[0][1])
  }
  return Object.fromEntries(entries.map(([key, item]) => [key, read(item)]))
}

/** A value for an answer, with tags for what JSON can't say everywhere. */
function show (value) {
  if (ArrayBuffer.isView(value)) return { $bytes: Buffer.from(value).toString('hex') }
  if (typeof value === 'bigint') return { $int: String(value) }
  if (Array.isArray(value)) return value.map(show)
  if (typeof value !== 'object' || value === null) return value ?? null
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, show(item)]))
}

/** The options of a command that have these names, as the package spells them. */
function optionsOf (command, names) {
  const options = {}
  for (const name of names) {
    const spelled = name.replace(/_(.)/g, (_, letter) => letter.toUpperCase())
    if (command[name] !== undefined) options[spelled] = command[name]
  }
  return options
}

const CALL = [
  'to', 'pool', 'key', 'headers', 'idempotency_key', 'redeliver', 'timeout_ms', 'id', 'window',
  'privileged', 'attempts'
]
const BLOCK = [
  'shape', 'dtype', 'size', 'create', 'write', 'pool', 'kind', 'slots', 'lifetime', 'readable_by',
  'writable_by'
]

function calling (command) {
  return [command.name, read(command.data), optionsOf(command, CALL)]
}

const numbers = (array) => Array.from(array, Number)

function itemOf (item) {
  if (typeof item?.result === 'function') {
    try {
      return { id: item.id, result: show(item.result()) }
    } catch (error) {
      return { id: item.id, error: describe(error) }
    }
  }
  if (item?.origin !== undefined) {
    const { name, pool, data, origin, lost, headers } = item
    return { name, pool, data: show(data), origin: origin.appId, lost, headers }
  }
  if (item?.event !== undefined) {
    const { event, pool, appId, fields } = item
    return { event, pool, app_id: appId, name: fields.name ?? null }
  }
  return show(item)
}

function describe (error) {
  if (!(error instanceof LatZeroError)) {
    const code = error.message === 'told to fail' ? 'other' : 'peer'
    return { code, message: code === 'other' ? error.message : error.stack }
  }
  const { code, message, ran, data, retryable } = error
  const family = error.name.replace(/(?<!Block)Error$/, '')
  const described = { code, message, ran, data: show(data), family, retryable }
  if (error instanceof HandlerFailedError) {
    described.type = error.type
    described.traceback = error.remoteTraceback
  }
  return described
}

const commands = {
  async connect ({ app, url, options = {} }) {
    const names = Object.keys(options)
    const made = await connect(url, optionsOf(options, names))
    apps.set(app, made)
    return { app_id: made.appId }
  },
  state: (command, app) => ({
    app_id: app.appId,
    joined: app.joined,
    is_connected: app.isConnected,
    is_stored: app.isStored
  }),
  instance: (command, app) => app.instance,
  async close (command, app) {
    apps.delete(command.app)
    await app.close()
  },
  join: ({ pool }, app) => app.join(pool),
  leave: ({ pool }, app) => app.leave(pool),
  apps: (command, app) => app.apps(),
  pools: (command, app) => app.pools(),
  trigger: ({ pool, name }, app) => app.trigger(pool, name),
  request: ({ message }, app) => app.request(message),
  ping: async (command, app) => await app.ping() < LONG_MS,
  call: async (command, app) => show(await app.call(...calling(command))),
  async reply (command, app) {
    const { data, headers } = await app.reply(...calling(command))
    return { data: show(data), headers }
  },
  submit (command, app) {
    const controller = new AbortController()
    const [name, data, options] = calling(command)
    const promise = app.call(name, data, { ...options, signal: controller.signal })
    promise.catch(() => {})
    const cancel = () => controller.abort(new CancelledError('cancelled', 'told to cancel'))
    things.set(command.as, { promise, cancel })
  },
  result: async ({ of }) => show(await take(of).promise),
  async park (command, app) {
    const parked = await app.park(...calling(command))
    things.set(command.as, parked)
    return parked.id
  },
  answer: async ({ of }) => show(await take(of).answer()),
  async answers (command, app) {
    const answers = app.answers()
    await answers.ready
    things.set(command.as, answers)
  },
  stream (command, app) {
    things.set(command.as, app.stream(...calling(command)))
  },
  async next ({ of }) {
    const { done, value } = await things.get(of).next()
    return done ? { over: true } : { item: itemOf(value) }
  },
  progress: ({ of }) => show(things.get(of).progress),
  end: ({ of }) => show(things.get(of).end),
  cancel ({ of }) {
    take(of).cancel()
  },
  async forget ({ of }) {
    const thing = take(of)
    if (thing.leave !== undefined) thing.leave()
    else await thing.return?.()
  },
  emit: (command, app) => app.emit(command.name, read(command.data),
    optionsOf(command, ['to', 'pool', 'headers', 'one', 'count', 'privileged'])),
  async events (command, app) {
    const events = app.events(command.name)
    await events.ready
    things.set(command.as, events)
  },
  async listen (command, app) {
    const notes = board.of(command.as)
    await app.on(command.name, (event) => { notes.push(show(event.data)) })
  },
  async watch (command, app) {
    const watching = app.watch(command.pool)
    await watching.ready
    things.set(command.as, watching)
  },
  async serve (command, app) {
    const options = optionsOf(command,
      ['pools', 'strategy', 'concurrency', 'doc', 'schema', 'privileged'])
    const way = ways[command.as]
    const { name } = command
    const served = await app.serve(name, (data, request) => way(data, request, name), options)
    things.set(`served ${command.app} ${name}`, served)
  },
  unserve: ({ app, name }) => take(`served ${app} ${name}`).close(),
  notes: ({ of }) => board.of(of),
  release ({ of }) {
    board.release(of)
  },
  async block (command, app) {
    blocks.set(command.as, await app.block(command.id, optionsOf(command, BLOCK)))
  },
  blocks: async ({ pool }, app) => (await app.blocks(pool)).map((block) => block.block_id),
  about ({ block }) {
    const of = blocks.get(block)
    return {
      id: of.id,
      pool: of.pool,
      nbytes: of.nbytes,
      version: of.version,
      generation: of.generation,
      is_live: of.isLive,
      is_mapped: of.isMapped,
      dtype: of.dtype,
      shape: of.shape
    }
  },
  read: async ({ block }) => numbers(await blocks.get(block).read()),
  read_at: async ({ block, offset, length }) =>
    show(await blocks.get(block).readAt(offset, length)),
  async view ({ block, as }) {
    const view = await blocks.get(block).view()
    things.set(as, view)
    return { version: view.version }
  },
  seen ({ of }) {
    const view = things.get(of)
    return { values: numbers(view.array()), valid: view.valid, stale: view.stale }
  },
  write (command) {
    const { block, values, at = 0, hold, fail } = command
    const options = optionsOf(command, ['keep', 'wait_ms'])
    if (command.part) options.part = [at, at + values.length]
    return blocks.get(block).write(async (array) => {
      array.set(values, command.part ? 0 : at)
      if (hold !== undefined) {
        board.of(hold).push('holds')
        await board.wait(hold)
      }
      if (fail) throw new Error('told to fail')
    }, options)
  },
  write_at (command) {
    const { block, offset, data } = command
    return blocks.get(block).writeAt(offset, read(data), optionsOf(command, ['if_version']))
  },
  cas: async ({ block, offset, expected, data }) =>
    show(await blocks.get(block).cas(offset, read(expected), read(data))),
  async lock (command) {
    const options = optionsOf(command, ['shared', 'wait_ms', 'lease_ms'])
    const lock = await blocks.get(command.block).lock(options)
    things.set(command.as, lock)
    return { fence: lock.fence }
  },
  async renew ({ of, lease_ms: leaseMs }) {
    const lock = things.get(of)
    await lock.renew(leaseMs)
    return lock.isHeld
  },
  holds: ({ of }) => things.get(of).isHeld,
  unlock: ({ of }) => take(of).unlock(),
  wait: (command) => blocks.get(command.block).wait(
    command.beyond, optionsOf(command, ['timeout_ms'])),
  async changes ({ block, as }) {
    const changes = blocks.get(block).changes()
    await changes.ready
    things.set(as, changes)
  },
  resize: ({ block, size }) => blocks.get(block).resize(size),
  flush: ({ block }) => blocks.get(block).flush(),
  remove: ({ block }) => blocks.get(block).remove(),
  info: ({ block }) => blocks.get(block).info(),
  close_block ({ block }) {
    blocks.get(block).close()
    blocks.delete(block)
  },
  async reset () {
    board.isOver = true
    things.clear()
    blocks.clear()
    const open = [...apps.values()]
    apps.clear()
    // The server may have been killed.
    await Promise.allSettled(open.map((app) => app.close()))
    board = new Board()
  }
}

/** Handlers, by what they do. */
const ways = {
  echo: (data) => data,
  double: ({ n }) => 2 * n,
  typed: ({ n }) => 2 * n,
  about (data, request) {
    const { name, pool, origin, headers, key, attempt, timeLeftMs } = request
    return {
      name,
      pool,
      origin: origin.appId,
      headers,
      key,
      attempt,
      data: show(data),
      has_time: timeLeftMs !== null && timeLeftMs < LONG_MS
    }
  },
  fail ({ message }) {
    throw new RangeError(message)
  },
  refuse ({ code, message, data }) {
    throw new Failure(code, message, data)
  },
  async hold (data, request, name) {
    const notes = board.of(name)
    const { attempt } = request
    notes.push({ started: attempt })
    if (await board.wait(name, request)) return { attempt }
    notes.push('cancelled')
    throw new Failure('cancelled', 'nobody wants the answer')
  },
  async * count ({ n, fail_at: failAt, progress }, request) {
    for (let i = 0; i < n; i++) {
      if (i === failAt) throw new RangeError('told to fail')
      if (progress) await request.progress({ of: n, done: i })
      yield { i }
    }
    return { sent: n }
  },
  * bytes () {
    for (let i = 0; i < 3; i++) yield Buffer.from([i, i])
    return Buffer.from([0xff])
  },
  async * endless (data, request, name) {
    const notes = board.of(name)
    let sent = 0
    try {
      for (;;) {
        yield sent++
        notes.splice(0, Infinity, sent)
      }
    } finally {
      notes.push('closed')
    }
  },
  record (data, { origin, headers }, name) {
    board.of(name).push({ data: show(data), origin: origin.appId, headers })
  },
  via: async ({ name, data }, { app }) => ({ via: await app.call(name, data) }),
  async sum ({ frame }) {
    const values = numbers(await frame.read())
    return { sum: values.reduce((a, b) => a + b, 0), is_mapped: frame.isMapped }
  },
  fill: ({ frame, value }) => frame.write((array) => { array.fill(value) }, { keep: false })
}

async function obey (line) {
  const command = JSON.parse(line)
  let answer
  try {
    const what = commands[command.do]
    if (what === undefined) throw new Error(`there is no command '${command.do}'`)
    answer = { ok: await what(command, apps.get(command.app)) ?? null }
  } catch (error) {
    answer = { error: describe(error) }
  }
  process.stdout.write(JSON.stringify({ number: command.number, ...answer }) + '\n')
}

const lines = createInterface({ input: process.stdin })
lines.on('line', obey)
lines.on('close', () => process.exit(0))
