// How the types are used from a module: checked by tsc, never run.

import latzero = require('latzero')
import * as module from 'latzero'
import { BlockError, Failure, LatZeroError, connect, writable } from 'latzero'
import type { App, Block, Event, Handler, Request, Stream } from 'latzero'
import { server } from 'latzero/testing'

const same: typeof latzero.connect = module.connect
void same

interface Point { x: number, y: number }

async function use (): Promise<void> {
  await using local = await server('--log-level', 'debug')
  await using app: App = await connect(local.url('me'), { bigint: true, callTimeoutMs: 100 })
  const n: number = await app.call<number>('double', { n: 1 }, { signal: AbortSignal.timeout(5) })
  const sent: void = await app.emit('done', n)
  const delivered: number = await app.emit('done', n, { count: true })
  const handler: Handler<Point> = async (point, request: Request) => {
    request.signal.throwIfAborted()
    await request.progress(0.5)
    return point.x + point.y
  }
  await app.serve('sum', handler, { concurrency: 4, schema: { type: 'object' } })
  await app.serve('count', async function * ({ n }: { n: number }) { yield n })
  await using told = await app.on('told', (event: Event<string>) => event.data.length)
  const items: Stream<number> = app.stream<number>('count', { n: 1 }, { window: 4 })
  for await (const item of items) item.toFixed()
  for await (const { appId } of app.watch('default')) appId?.trim()
  const parked = await app.park<string>('bill', 1, { id: 'x' })
  const bill: string = await parked.answer()
  const block: Block = await app.block('b', { shape: [2, 2], dtype: Float32Array, create: true })
  const copy: Float32Array = await block.read()
  const total: number = await block.read((array: Float32Array) => array.length)
  const version: number = await block.write((array: Float32Array) => { array.fill(1) })
  await using writer = await block.writer({ waitMs: 10 })
  const next: number = await writer.write((array: DataView) => array, { keep: false })
  // @ts-expect-error: the lock is held already.
  await writer.write(() => {}, { waitMs: 5 })
  const seen: Float32Array = (await block.view()).array()
  await app.call('darken', { block, also: writable(block) })
  const again: Block = await app.block(block.handle)
  await using followed = app.onState((state) => state === 'connected' || app.lost > 0)
  // @ts-expect-error: there is no such state.
  app.onState((state) => state === 'gone')
  void [again, next, seen, followed, sent, delivered, told, bill, copy, total, version]
  try {
    throw new Failure('odd', 'message', { a: 1 })
  } catch (error) {
    if (error instanceof BlockError) error.code.trim()
    else if (error instanceof LatZeroError && error.retryable) error.hint?.trim()
  }
  // @ts-expect-error: times are in milliseconds.
  await app.call('x', 1, { timeout: 5 })
  // @ts-expect-error: a name is needed.
  await app.call()
}

void use
