// How the types are used from CommonJS: checked by tsc, never run.

import latzero = require('latzero')
import testing = require('latzero/testing')

async function use (): Promise<number> {
  const server: testing.Server = await testing.server()
  const app: latzero.App = await latzero.connect(server.url('me'))
  const error: latzero.LatZeroError = new latzero.TimeoutError('timeout', 'late', { ran: 'no' })
  await app.close()
  return await app.call<number>('x', error.code)
}

void use
