// The tarballs, installed without network into empty folders. `cargo xtask test --node` makes them.

import assert from 'node:assert/strict'
import { execFileSync, spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'

import { findProgram, server } from 'latzero/testing'

const packages = process.env.NODE_PACKAGES
const skip = packages === undefined && 'NODE_PACKAGES names no tarballs'
const tarballs = skip ? [] : readdirSync(packages).filter((name) => name.endsWith('.tgz')).sort()

const env = { ...process.env }
for (const name of Object.keys(env)) {
  if (name.startsWith('LATZERO_') || name.startsWith('NODE_')) delete env[name]
}

/** An empty folder into which tarballs are installed. */
function installed (t, names) {
  const folder = mkdtempSync(join(tmpdir(), 'latzero-npm-'))
  t.after(() => rmSync(folder, { recursive: true, force: true }))
  writeFileSync(join(folder, 'package.json'), '{"private": true}')
  const files = names.map((name) => join(packages, name))
  const install = ['install', '--offline', '--silent', '--ignore-scripts', '--no-audit',
    '--no-fund', '--cache', join(folder, 'cache'), ...files]
  execFileSync('npm', install, { cwd: folder, env, stdio: 'inherit' })
  return folder
}

test('a server for tests does not see what is meant for others', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'latzero-private-'))
  const [seen, program] = [join(folder, 'seen'), join(folder, 'program')]
  const script = `#!/bin/sh\nenv > '${seen}'\nexec '${findProgram()}' "$@"\n`
  writeFileSync(program, script, { mode: 0o755 })
  const before = { ...process.env }
  t.after(() => {
    process.env = before
    rmSync(folder, { recursive: true, force: true })
  })
  Object.assign(process.env, { LATZERO_BIN: program, LATZERO_PORT: 'none', LATZERO_URL: 'none' })
  const local = await server()
  await local.close()
  const names = readFileSync(seen, 'utf8').match(/^LATZERO_[A-Z_]*/gm)
  assert.deepEqual(names, ['LATZERO_BIN'])
})

test('there is a tarball of the package and one of the platform', { skip }, () => {
  assert.equal(tarballs.length, 2)
  assert.match(tarballs[0], /^latzero-[0-9.]+\.tgz$/)
  assert.match(tarballs[1], /^latzero-linux-[a-z0-9]+-(gnu|musl)-[0-9.]+\.tgz$/)
})

test('the installed package calls with one line', { skip, timeout: 300_000 }, (t) => {
  const folder = installed(t, tarballs)
  const script = `
    import { connect } from 'latzero'
    import { findProgram, server } from 'latzero/testing'
    const local = await server()
    const app = await connect(local.url('me', 'system'))
    console.log(await app.call('echo', 'hello'), findProgram().includes('node_modules'))
    await app.close()
    await local.close()`
  const run = (args) => execFileSync(process.execPath, args, { cwd: folder, env }).toString()
  assert.equal(run(['--input-type=module', '--eval', script]), 'hello true\n')
  assert.match(run(['-e', "console.log(typeof require('latzero').connect)"]), /^function\n$/)
  const { version } = JSON.parse(readFileSync(join(folder, 'node_modules/latzero/package.json')))
  const program = join(folder, 'node_modules/.bin/latzero')
  assert.equal(execFileSync(program, ['--version'], { env }).toString(), `latzero ${version}\n`)
  const failed = spawnSync(program, ['nonsense'], { env })
  assert.equal(failed.status, 2)
  const inside = readdirSync(join(folder, 'node_modules/latzero')).sort()
  assert.deepEqual(inside, ['LICENSE', 'README.md', 'bin', 'lib', 'package.json'])
})

test('without the platform package an error names the repair', { skip, timeout: 300_000 }, (t) => {
  const folder = installed(t, tarballs.slice(0, 1))
  const ended = spawnSync(process.execPath, ['-e', "require('latzero')"], { cwd: folder, env })
  assert.equal(ended.status, 1)
  assert.match(ended.stderr.toString(), /@latzero\/linux-\S+ is not installed.*npm\/cli#4828/)
  const program = spawnSync(join(folder, 'node_modules/.bin/latzero'), ['--version'], { env })
  assert.equal(program.status, 1)
  assert.match(program.stderr.toString(), /is not installed/)
})
