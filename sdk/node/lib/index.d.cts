// The types of the package `latzero`.

/// <reference types="node" />

/** Milliseconds. */
export type Milliseconds = number

/** Bytes that travel raw, as the whole payload. */
export type Bytes = ArrayBufferView | ArrayBuffer | SharedArrayBuffer

/** An app, or one instance of it. */
export type Destination = string | Origin

/** Who calls or emits, as the server vouches for. */
export interface Origin {
  /** Its AppID. */
  appId: string
  /** The id of its connection. */
  instance: string
}

/** How an app connects. */
export interface ConnectOptions {
  /** Further pools to join. */
  pools?: string[]
  /** Refuse to connect while another instance of the app lives, and to let one in. */
  exclusive?: boolean
  /** Displace other instances of the app. */
  takeover?: boolean
  /** Ask for the pools and triggers that the server remembers of this AppID. */
  rehydrate?: boolean
  /** Have the server remember nothing of the app. */
  transient?: boolean
  /** Shown in listings of apps. */
  meta?: Record<string, unknown>
  /** Connect again after a loss (default `true`). */
  reconnect?: boolean
  /** How long connecting may take (default 5,000). */
  connectTimeoutMs?: Milliseconds
  /** How long calls may take that say nothing else (default 30,000). */
  callTimeoutMs?: Milliseconds
  /**
   * Read integers that a number can't hold exactly as `bigint`, if they are from −2⁶³ to 2⁶⁴−1
   * (default `false`).
   */
  bigint?: boolean
  /** Refuse NaN and infinities instead of writing them as `null` (default `false`). */
  strict?: boolean
  /** Tell callers the stack of what a handler threw (default `true`). */
  tracebacks?: boolean
}

/** How a call is made. */
export interface CallOptions {
  /** How long the answer may take. */
  timeoutMs?: Milliseconds
  /** Cancels the call; it rejects with the reason of the signal. */
  signal?: AbortSignal
  /** The app to call, where several serve the trigger. */
  to?: Destination
  /** The pool; needed where the app is in several. */
  pool?: string
  /** The key of a sticky trigger. */
  key?: string
  /** Passed to the handler untouched. */
  headers?: Record<string, string>
  /** Calls with the same key run once, and get the same answer. */
  idempotencyKey?: string
  /** Give the call to another handler if its handler's is lost: it may run more than once. */
  redeliver?: boolean
  /** The most handlers that a parked or redelivered call is given to (default 5). */
  attempts?: number
  /** The call's id, by which its answer is known after a restart. */
  id?: string
  /** Sign the call, for a privileged trigger of an encrypted pool. */
  privileged?: boolean
}

/** How a streamed answer is asked for. */
export interface StreamOptions extends CallOptions {
  /** Items that may be under way (default 64). */
  window?: number
}

/** How an emit is made. */
export interface EmitOptions {
  /** The app whose handlers alone get it. */
  to?: Destination
  /** The pool; needed where the app is in several. */
  pool?: string
  /** The key of a sticky trigger. */
  key?: string
  /** Passed to the handlers untouched. */
  headers?: Record<string, string>
  /** Only one handler gets it. */
  one?: boolean
  /** Resolve with the number of handlers that it went to. */
  count?: boolean
  /** Sign it, for privileged handlers of an encrypted pool. */
  privileged?: boolean
}

/** How a trigger is offered. */
export interface ServeOptions {
  /** Serve in these pools alone. */
  pools?: string[]
  /** How calls are spread over the handlers (default `round_robin`). */
  strategy?: string
  /** Calls at a time at most. */
  concurrency?: number
  /** What the trigger does, for people. */
  doc?: string
  /**
   * What the trigger takes, by convention in JSON Schema 2020-12: at most 4 KiB. Other apps read it
   * with `app.trigger`; nothing is checked against it.
   */
  schema?: Record<string, unknown>
  /** Take only calls and emits that a writer of an encrypted pool signed. */
  privileged?: boolean
}

/**
 * What happened to a connection. After `disconnected` the app connects again by itself, unless it
 * may not: then `closed` follows. `displaced` by another instance and `closed` are the end.
 */
export type State = 'connected' | 'disconnected' | 'displaced' | 'closed'

/** By which another thread or process opens a block. It may be sent to any of them. */
export interface BlockHandle {
  /** Its name. */
  readonly id: string
  /** Its pool. */
  readonly pool: string
}

/** An answer with its headers. */
export interface Reply<T = unknown> {
  /** What the handler answered. */
  data: T
  /** What the handler sent along. */
  headers: Record<string, string>
}

/** An emit that arrived. */
export interface Event<T = unknown> {
  /** The name that was emitted. */
  name: string
  /** The pool where. */
  pool: string
  /** What was emitted. */
  data: T
  /** Who emitted it. */
  origin: Origin
  /** What was sent along, untouched. */
  headers: Record<string, string>
  /** How many were dropped just before this one, because nobody took them. */
  lost: number
}

/** Something that changed in a pool. */
export interface Presence {
  /** `app_online`, `app_offline`, `trigger_added`, … */
  event: string
  /** The pool where; `null` where it is of none. */
  pool: string | null
  /** The app that it is about. */
  appId: string | null
  /** The instance that it is about. */
  instance: string | null
  /** The whole message. */
  fields: Record<string, unknown>
  /** How many were dropped just before this one, because nobody took them. */
  lost: number
}

/** The answer to a call that nobody in this process waits for. */
export interface Answer<T = unknown> {
  /** The call's id. */
  id: string
  /** The call's pool, if it is known. */
  pool: string | null
  /** How many were dropped just before this one, because nobody took them. */
  lost: number
  /** What the handler answered; throws what it failed with. */
  result(): T
}

/** A call that the server keeps until it is answered. */
export interface Parked<T = unknown> {
  /** By which `answers()` knows the call, also after a restart. */
  readonly id: string
  /** Waits for the answer. A `signal` ends only the wait, which may be repeated. */
  answer(options?: { signal?: AbortSignal }): Promise<T>
  /** Leaves the call, which goes on: its answer goes to `answers()`. */
  leave(): void
  /** Ends the call. */
  cancel(): void
}

/** A streamed answer. It is sent when the first item is asked for. */
export interface Stream<T = unknown> extends AsyncIterableIterator<T> {
  /** The newest report of the handler on its progress. */
  readonly progress: unknown
  /** What the handler answered behind the last item. */
  readonly end: unknown
  /** Cancels the call, if it has not ended. */
  return(value?: unknown): Promise<IteratorResult<T>>
  /** Cancels the call. */
  cancel(): void
  /** The stream itself. */
  [Symbol.asyncIterator](): Stream<T>
  /** Cancels the call, if it has not ended. */
  [Symbol.asyncDispose](): Promise<void>
}

/** Events of some kind, one after the other, from now on. */
export interface Inflow<T> extends AsyncIterableIterator<T> {
  /** Resolves when the server has been told; rejects if it refuses. */
  readonly ready: Promise<void>
  /** Stops listening. */
  return(value?: unknown): Promise<IteratorResult<T>>
  /** The source itself. */
  [Symbol.asyncIterator](): Inflow<T>
  /** Stops listening. */
  [Symbol.asyncDispose](): Promise<void>
}

/** A trigger that an app serves. */
export interface Served {
  /** The name of the trigger. */
  readonly name: string
  /** Serves it no longer. Calls that run are finished. */
  close(): Promise<void>
  /** As `close`. */
  [Symbol.asyncDispose](): Promise<void>
}

/** A function that is called with emits. */
export interface Subscription {
  /** What is listened to. */
  readonly name: string
  /** Stops listening. */
  close(): Promise<void>
  /** As `close`. */
  [Symbol.asyncDispose](): Promise<void>
}

/** A call as its handler sees it. */
export interface Request {
  /** The app that serves. */
  readonly app: App
  /** The name of the trigger. */
  readonly name: string
  /** The pool where it is served. */
  readonly pool: string
  /** Who calls. */
  readonly origin: Origin
  /** Whether it is an emit, whose answer nobody receives. */
  readonly isEmit: boolean
  /** How many emits were dropped just before this one: 1024 waited or were worked on. */
  readonly lost: number
  /** What the caller sent along, untouched. */
  readonly headers: Record<string, string>
  /** The key of a sticky trigger. */
  readonly key: string | null
  /** 1, or more where a handler may have run before. */
  readonly attempt: number
  /** What is left of the call's time; `null` for an emit. */
  readonly timeLeftMs: Milliseconds | null
  /** Whether the caller does not want the answer any more. */
  readonly cancelled: boolean
  /** Fires when the caller does not want the answer any more. */
  readonly signal: AbortSignal
  /** Reports how far the work is. */
  readonly progress: (report: unknown) => Promise<void>
  /** A block that came with the call, for as long as the call lasts. */
  readonly block: (id: string) => Block
}

/** Answers a value, a promise of one, or an iterator, whose items are streamed. */
export type Handler<D = any> = (data: D, request: Request) => unknown

/** A connection to the server, as an app. */
export interface App {
  /** The AppID. */
  readonly appId: string
  /** The id of the live connection; another one after a reconnect. */
  readonly instance: string | undefined
  /** The pools that the app is in. */
  readonly joined: string[]
  /** Whether there is a connection just now. */
  readonly isConnected: boolean
  /** Whether the server has on disk what the app registered. */
  readonly isStored: boolean
  /** How many events and answers were dropped so far because nobody took them in time. */
  readonly lost: number
  /**
   * Calls `listener` when the connection changes: it was lost, was made again, or has ended. This
   * does not keep the process alive.
   */
  onState(listener: (state: State) => unknown): Subscription
  /** Calls the trigger `name`. */
  call<T = any>(name: string, data?: unknown, options?: CallOptions): Promise<T>
  /** As `call`, with the headers of the answer. */
  reply<T = any>(name: string, data?: unknown, options?: CallOptions): Promise<Reply<T>>
  /**
   * Makes a call that the server keeps on disk until it is answered. Resolves when it is there,
   * also where a handler takes it at once.
   */
  park<T = any>(name: string, data?: unknown, options?: CallOptions): Promise<Parked<T>>
  /** Answers to parked calls of this and earlier lives that nobody here waits for. */
  answers<T = any>(): Inflow<Answer<T>>
  /** Tells every handler of the trigger `name`. */
  emit(name: string, data: unknown, options: EmitOptions & { count: true }): Promise<number>
  /** Tells every handler of the trigger `name`. */
  emit(name: string, data?: unknown, options?: EmitOptions): Promise<void>
  /** Calls the trigger `name` for a streamed answer. */
  stream<T = any>(name: string, data?: unknown, options?: StreamOptions): Stream<T>
  /** Serves the trigger `name`. */
  serve<D = any>(name: string, handler: Handler<D>, options?: ServeOptions): Promise<Served>
  /** Calls `listener` with each emit of `name`. What it throws is a warning. */
  on<T = any>(name: string, listener: (event: Event<T>) => unknown): Promise<Subscription>
  /** Emits of `name`. */
  events<T = any>(name: string): Inflow<Event<T>>
  /** Apps and triggers of a pool that come and go. */
  watch(pool: string): Inflow<Presence>
  /** Opens a memory block: makes it, or attaches it. */
  block(id: string | BlockHandle, options?: BlockOptions): Promise<Block>
  /** The blocks of a pool, as the server describes them. */
  blocks(pool?: string): Promise<Array<Record<string, any>>>
  /** Joins a pool. */
  join(pool: string): Promise<void>
  /** Leaves a pool. */
  leave(pool: string): Promise<void>
  /** The apps that the server knows, as it describes them. */
  apps(): Promise<Record<string, any>>
  /** The pools that the server knows, as it describes them. */
  pools(): Promise<Record<string, any>>
  /**
   * What the server knows of a trigger: its `doc`, its `schema`, its handlers and more. `null` if
   * nobody serves it.
   */
  trigger(pool: string, name: string): Promise<Record<string, any> | null>
  /** Asks the server for anything: a message of the protocol with its `action`. */
  request<T = any>(message: Record<string, unknown>): Promise<T>
  /** How long the server takes to answer. */
  ping(): Promise<Milliseconds>
  /** Closes, after the handlers that run, which have five seconds. */
  close(): Promise<void>
  /** Keeps the process alive as long as the app is open. */
  ref(): this
  /** Never keeps the process alive. */
  unref(): this
  /** As `close`. */
  [Symbol.asyncDispose](): Promise<void>
}

/** A class of typed arrays. */
export interface NumberArrayConstructor {
  /** The size of an element. */
  readonly BYTES_PER_ELEMENT: number
}

/** How a block is made or opened. */
export interface BlockOptions {
  /** The lengths; with `dtype`. */
  shape?: number | number[]
  /** The type of an element: `'f4'` as in numpy, or `Float32Array`. */
  dtype?: string | NumberArrayConstructor
  /** The size in bytes, instead of a layout. */
  size?: number
  /** Make it: `true` takes one of the same size and layout, `'new'` does not. */
  create?: boolean | 'new'
  /** Open it for writing; by default if that is allowed. */
  write?: boolean
  /** The pool; needed where the app is in several. */
  pool?: string
  /** `persistent`: a file that outlives the machine's restarts (default `shared`). */
  kind?: 'shared' | 'persistent'
  /** `raw`: one slot, written in place (default `snapshot`). */
  consistency?: 'snapshot' | 'raw'
  /** How many versions have a place of their own (default 2). */
  slots?: number
  /** The apps that may read it. */
  readableBy?: string[]
  /** The apps that may write it. */
  writableBy?: string[]
  /** `attached`: it goes when nobody has it open any more. */
  lifetime?: 'pool' | 'attached'
}

/** How the bytes of a block are read. */
export interface BlockLayout {
  /** The type of an element, in numpy's spelling: `'<f4'`. */
  dtype: string
  /** The lengths. */
  shape: number[]
}

/** What the bytes of a block are read as; by its dtype. */
export type BlockArray =
  | Int8Array | Uint8Array | Int16Array | Uint16Array | Int32Array | Uint32Array
  | BigInt64Array | BigUint64Array | Float32Array | Float64Array | DataView

/** A memory block that the app takes part in. */
export interface Block {
  /** Its name. */
  readonly id: string
  /** Its pool. */
  readonly pool: string
  /** Its size in bytes. */
  readonly nbytes: number
  /** The number of its newest version. */
  readonly version: number
  /** The number of its memory: a resize gives it another. */
  readonly generation: number
  /** Whether the server is connected and has it. */
  readonly isLive: boolean
  /** Whether its bytes are mapped into this process, rather than copied through the server. */
  readonly isMapped: boolean
  /** How its arrays are read; `null` without a layout, and where a resize made it another size. */
  readonly layout: BlockLayout | null
  /** What to send to another thread or process, which opens it with `app.block(handle)`. */
  readonly handle: BlockHandle
  /** The type of an element, in numpy's spelling; `null` as `layout`. */
  readonly dtype: string | null
  /** The lengths; `null` as `layout`. */
  readonly shape: number[] | null
  /** A private copy of the newest version. */
  read<A extends BlockArray = any>(): Promise<A>
  /**
   * Hands the newest version itself to `fn`, and takes its memory back when `fn` is done. If the
   * version was written over meanwhile, `fn` runs again with the newest.
   */
  read<R, A extends BlockArray = any>(fn: (array: A, version: number) => R): Promise<Awaited<R>>
  /** Fills `target` with the newest version; the version. */
  readInto(target: Bytes): Promise<number>
  /** Some bytes of the newest version. */
  readAt(offset: number, length: number): Promise<Buffer>
  /** One version in place, for as long as the view is referred to. */
  view(): Promise<View>
  /** Hands the next version to `fn` and publishes it; its number. */
  write<A extends BlockArray = any>(
    fn: (array: A) => unknown, options?: WriteOptions
  ): Promise<number>
  /** Takes the lock for many versions. */
  writer(options?: { waitMs?: Milliseconds }): Promise<Writer>
  /** Writes bytes through the server; the version. */
  writeAt(offset: number, data: Bytes, options?: { ifVersion?: number }): Promise<number>
  /** Writes `data` where `expected` stands: `undefined`. Else the bytes that stand there. */
  cas(offset: number, expected: Bytes, data: Bytes): Promise<Buffer | undefined>
  /** Waits for a version newer than `beyond` (default: than the one now); the version. */
  wait(
    beyond?: number, options?: { timeoutMs?: Milliseconds, signal?: AbortSignal }
  ): Promise<number>
  /** The versions to come: the newest of those that came since the last look each time. */
  changes(): Inflow<number>
  /** Takes the lock. */
  lock(options?: LockOptions): Promise<Lock>
  /** Gives it another size in bytes: a new generation. */
  resize(nbytes: number): Promise<void>
  /** Flushes a persistent block to disk; the version that is there. */
  flush(): Promise<number>
  /** Removes it, for everybody. */
  remove(): Promise<void>
  /** All about it, as the server describes it. */
  info(): Promise<Record<string, any>>
  /** Detaches from the block. */
  close(): void
}

/** How a version is written. */
export interface WriteOptions {
  /** Begin as the version before (default); else it holds old bytes, and all must be written. */
  keep?: boolean
  /** Only these rows: `[start, end]`. */
  part?: [number, number]
  /** How long to wait for the lock (default 1,000). */
  waitMs?: Milliseconds
}

/** The lock of a block under which many versions are written. */
export interface Writer {
  /** Larger than that of every lock of this block before. */
  readonly fence: number
  /** Whether the lock is held, as far as is known here. */
  readonly isHeld: boolean
  /** Hands the next version to `fn` and publishes it; its number. */
  write<A extends BlockArray = any>(
    fn: (array: A) => unknown, options?: Omit<WriteOptions, 'waitMs'>
  ): Promise<number>
  /** Gives the lock back, after the versions that were begun. */
  close(): Promise<void>
  /** As `close`. */
  [Symbol.asyncDispose](): Promise<void>
}

/** How a lock is taken. */
export interface LockOptions {
  /** Others may have it too, if theirs is shared. */
  shared?: boolean
  /** How long to wait for it (default 1,000). */
  waitMs?: Milliseconds
  /** How long it is held without `renew`; else as long as the connection. */
  leaseMs?: Milliseconds
}

/** The lock of a block. */
export interface Lock {
  /** Larger than that of every lock of this block before. */
  readonly fence: number
  /** Whether it is held, as far as is known here. */
  readonly isHeld: boolean
  /** Holds it for so long from now on, or as long as the connection. */
  renew(leaseMs?: Milliseconds): Promise<void>
  /** Gives it back. */
  unlock(): Promise<void>
  /** As `unlock`. */
  [Symbol.asyncDispose](): Promise<void>
}

/**
 * One version of a block. Its array lies in the block's memory: a later version may come to lie in
 * the same place, and `valid` is false from then on. Writing the array changes nothing for others.
 */
export interface View {
  /** Its memory. */
  readonly buffer: ArrayBuffer
  /** The number of the version. */
  readonly version: number
  /** Whether the block's memory still has this version; ask after the array was read. */
  readonly valid: boolean
  /** Whether the block was resized or removed since. */
  readonly stale: boolean
  /** The version as a typed array; always the same. */
  array<A extends BlockArray = any>(): A
}

/** A block that the handler of a call may write. */
export interface Writable {
  /** What tells it from the block itself. */
  readonly isWritable: true
}

/** Connects. Without an address: `LATZERO_URL`, else an app of the script's name and pid. */
export function connect(url?: string | URL | null, options?: ConnectOptions): Promise<App>

/** Marks a block in the data of a call: its handler may write it. */
export function writable(block: Block): Writable

/** An error. `code` is one of docs/errors.md, or one that a handler chose. */
export class LatZeroError extends Error {
  /** As the package makes them. */
  constructor(code: string, message: string, more?: {
    ran?: 'no' | 'unknown' | null, data?: unknown, hint?: string | null
  })

  /** One of docs/errors.md, or one that a handler chose. */
  readonly code: string
  /** Whether the handler ran; `null` where it says so itself. */
  readonly ran: 'no' | 'unknown' | null
  /** What a handler told besides. */
  readonly data: any
  /** What to do. */
  readonly hint: string | null
  /** Whether the call certainly did not run, and may succeed later. */
  readonly retryable: boolean
}

/** Nobody can take the call now. */
export class UnavailableError extends LatZeroError {}
/** The time ended before the answer came. */
export class TimeoutError extends LatZeroError {}
/** The call was cancelled. */
export class CancelledError extends LatZeroError {}
/** The connection, or the handler's, ended. */
export class DisconnectedError extends LatZeroError {}
/** The handler threw, or answered with a code of its own. */
export class HandlerFailedError extends LatZeroError {
  /** The class of what the handler threw. */
  readonly type: string | null
  /** The handler's stack, as text. */
  readonly remoteTraceback: string | null
}
/** The server does not allow it. */
export class ForbiddenError extends LatZeroError {}
/** The request is wrong as it is. */
export class BadRequestError extends LatZeroError {}
/** Something about a block. */
export class BlockError extends LatZeroError {}
/** The server can't do it: a quota, its disk, or a bug. */
export class ServerFailedError extends LatZeroError {}
/** Keys or sealed data are wrong. */
export class CryptoFailedError extends LatZeroError {}

/** Thrown by a handler to answer with a code of its own. */
export class Failure extends Error {
  /** `code` is the word for it, and `data` is told besides the message. */
  constructor(code: string, message?: string, data?: unknown)
  /** What the caller gets as `code`. */
  readonly code: string
  /** What the caller gets as `data`. */
  readonly data: unknown
}
