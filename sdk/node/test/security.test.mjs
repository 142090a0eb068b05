// Encrypted pools, and servers behind TLS.

import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { join } from 'node:path'
import { test } from 'node:test'

import { LatZeroError, connect } from 'latzero'
import { findProgram, server } from 'latzero/testing'
import { all, withServer } from './helpers.mjs'

const place = withServer()

/** A server with the encrypted pool `vault`; the address of an app with its keys. */
async function vault () {
  const { dataDir, socket } = place.server
  // What the client remembers of encrypted pools.
  process.env.XDG_STATE_HOME = dataDir
  const file = join(dataDir, `keys-${Date.now()}`)
  const pool = `vault-${Date.now()}`
  execFileSync(findProgram(), ['keys', 'new', pool, '--file', file])
  const create = ['pools', 'create', pool, '--encrypted', '--keys', file, '--socket', socket]
  execFileSync(findProgram(), create)
  return { pool, url: (id) => `${place.server.url(id, pool)}&keys=${encodeURIComponent(file)}` }
}

test('calls, streams, events and blocks of an encrypted pool', async (t) => {
  const { pool, url } = await vault()
  const serves = await connect(url('serves'))
  t.after(() => serves.close())
  const calls = await connect(url('calls'))
  t.after(() => calls.close())
  await serves.serve('double', ({ n }) => 2 * n)
  assert.equal(await calls.call('double', { n: 4 }), 8)
  await serves.serve('back', (data) => data.reverse())
  assert.deepEqual(await calls.call('back', Buffer.from('abc')), Buffer.from('cba'))
  await serves.serve('fails', () => { throw new RangeError('sealed') })
  await assert.rejects(calls.call('fails'), { type: 'RangeError', code: 'handler_error' })
  await serves.serve('count', function * () { yield * [1, 2, 3] })
  assert.deepEqual(await all(calls.stream('count')), [1, 2, 3])
  const events = serves.events('e')
  await events.ready
  await calls.emit('e', { a: 1 })
  assert.deepEqual((await events.next()).value.data, { a: 1 })
  const block = await calls.block('b', { shape: 4, dtype: 'f4', create: true })
  assert.equal(block.isMapped, false)
  await block.write((array) => array.fill(2))
  await block.write((array) => { array[0] = 3 }, { part: [0, 1] })
  const other = await serves.block('b')
  assert.deepEqual(await other.read(), new Float32Array([3, 2, 2, 2]))
  // Without keys there is nothing to join.
  await assert.rejects(connect(place.server.url('stranger', pool)), LatZeroError)
})

test('a pool that is not encrypted with these keys is refused', async (t) => {
  const { pool, url } = await vault()
  const plain = await connect(place.server.url('plain', 'plain'))
  t.after(() => plain.close())
  const wrong = url('x').replace(`pool=${pool}`, 'pool=plain')
  const expected = { name: 'ForbiddenError', code: 'unauthenticated' }
  await assert.rejects(connect(wrong), expected)
})

test('a server behind TLS is known by its pin', async (t) => {
  const tls = await server('--tls')
  t.after(() => tls.close())
  const url = `latzero://me@${tls.address}?tls&pool=system&pin=`
  const app = await connect(url + tls.pin)
  t.after(() => app.close())
  assert.equal(await app.call('echo', 'by TLS'), 'by TLS')
  const wrong = tls.pin.replace(/^./, (c) => c === 'A' ? 'B' : 'A')
  await assert.rejects(connect(url + wrong), LatZeroError)
})
