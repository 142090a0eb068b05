// Says how good a secret is, without telling it: `node auditor.mjs KEYFILE`.

import { connect } from 'latzero'

const app = await connect(`latzero://auditor?pool=vault&keys=${process.argv[2]}`)

await app.serve('audit', async ({ name }) => {
  const secret = await app.call('reveal', { name }, { to: 'ledger' })
  return { letters: secret.length, different: new Set(secret).size }
})

console.log('ready')
