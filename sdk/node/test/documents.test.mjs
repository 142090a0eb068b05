// The examples of the documents, run as they are printed.

import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { readFileSync, rmSync, writeFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { test } from 'node:test'

import { withServer } from './helpers.mjs'

const place = withServer()
const root = new URL('../../../', import.meta.url)

/** The examples of a document, behind each other, on the lines that they have there. */
function code (document) {
  let isInside = false
  return readFileSync(new URL(document, root), 'utf8').split('\n').map((line) => {
    const fence = /^```(\w*)$/.exec(line)
    if (fence === null) return isInside ? line : ''
    isInside = fence[1] === 'js' && !isInside
    return ''
  }).join('\n')
}

for (const [i, document] of ['docs/node.md', 'README.md', 'sdk/node/README.md'].entries()) {
  test(`the examples of ${document} run`, (t) => {
    const script = fileURLToPath(new URL(`example-${process.pid}-${i}.mjs`, import.meta.url))
    const text = code(document)
    assert.match(text, /latzero/)
    writeFileSync(script, text)
    t.after(() => rmSync(script))
    // The examples name no server: it is the one of the data directory.
    const env = { ...process.env, LATZERO_DATA_DIR: place.server.dataDir }
    const said = execFileSync(process.execPath, [script], {
      env, timeout: 60_000, stdio: ['ignore', 'pipe', 'inherit'], encoding: 'utf8'
    })
    if (document !== 'sdk/node/README.md') assert.match(said, /^{ x: 42 }\n/)
  })
}

test('the reference names every method and option', () => {
  const document = readFileSync(new URL('docs/node.md', root), 'utf8')
  const types = readFileSync(new URL('sdk/node/lib/index.d.cts', root), 'utf8')
  const members = (name) => {
    const body = new RegExp(`export interface ${name}\\b[^{]*{\n(.*?)\n}`, 's').exec(types)[1]
    return [...body.matchAll(/^ {2}(?:readonly )?([a-zA-Z]+)[?(:<]/gm)].map(([, word]) => word)
  }
  for (const name of ['App', 'Request', 'CallOptions', 'EmitOptions', 'ServeOptions',
    'StreamOptions', 'ConnectOptions', 'Block', 'BlockOptions', 'WriteOptions', 'LockOptions']) {
    assert.ok(members(name).length > 0)
    for (const word of members(name)) {
      const places = name === 'Block' && /^(id|pool|nbytes|dtype|shape|layout|is.*|gen.*)$/
      if (places && places.test(word)) continue
      assert.match(document, new RegExp(`\`[^\`]*\\b${word}\\b`), `${name}.${word}`)
    }
  }
})
