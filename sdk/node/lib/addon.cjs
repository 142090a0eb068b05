'use strict'

// Finds the addon and the program of this platform: in a checkout beside this file, else in the
// package of the platform.

const { existsSync } = require('node:fs')
const { dirname, join } = require('node:path')

const { version } = require('../package.json')

/** `gnu` or `musl`: the C library that this Node was linked with. It takes a few milliseconds. */
function libc () {
  const before = process.report.excludeNetwork
  process.report.excludeNetwork = true
  const { header } = process.report.getReport()
  process.report.excludeNetwork = before
  return header.glibcVersionRuntime ? 'gnu' : 'musl'
}

/** The name of this platform, as its package has it. */
function platform () {
  const name = `${process.platform}-${process.arch}`
  return process.platform === 'linux' ? `${name}-${libc()}` : name
}

/** What the package of a platform says of itself: of this one, or of another with Linux. */
function manifest (other) {
  if (other !== undefined) return manifestOf(`linux-${other.cpu}-${other.libc}`, 'linux', other)
  const linux = process.platform === 'linux' && { libc: libc() }
  return manifestOf(platform(), process.platform, { cpu: process.arch, ...linux })
}

function manifestOf (name, os, { cpu, libc }) {
  return {
    name: `@latzero/${name}`,
    version,
    description: `The addon and the program of the package latzero for ${name}`,
    license: 'MIT',
    os: [os],
    cpu: [cpu],
    ...libc !== undefined && { libc: [libc === 'gnu' ? 'glibc' : 'musl'] },
    files: ['latzero.node', 'latzero']
  }
}

/** The directory of a package of a platform; `undefined` if it is not installed. */
function directory (name) {
  try {
    return dirname(require.resolve(`@latzero/${name}/package.json`))
  } catch (error) {
    if (error.code !== 'MODULE_NOT_FOUND') throw error
    return undefined
  }
}

/** The directory of the package of this platform; `undefined` if it is not installed. */
function installed () {
  const name = `${process.platform}-${process.arch}`
  const [gnu, musl] = [directory(`${name}-gnu`), directory(`${name}-musl`)]
  // Some package managers install both.
  if (gnu !== undefined && musl !== undefined) return libc() === 'gnu' ? gnu : musl
  return gnu ?? musl
}

/** Where a file of this platform is; `undefined` if it is nowhere. */
function find (file) {
  const beside = join(__dirname, '..', 'native', file)
  if (existsSync(beside)) return beside
  const package_ = installed()
  return package_ && join(package_, file)
}

/**
 * Whether the event loop reads the sockets, rather than a thread of the client. Only that of Node
 * can: Bun and Deno may have the functions of libuv, and abort when they are called.
 */
function mayLoop () {
  const { node, bun, deno } = process.versions
  const isNode = node !== undefined && bun === undefined && deno === undefined
  return isNode && process.env.LATZERO_NODE_DRIVER !== 'thread'
}

/** What to do where the package of the platform is not installed. */
function missing () {
  const name = `@latzero/${platform()}`
  return new Error(
    `latzero: the package ${name} is not installed. npm sometimes leaves out such optional ` +
    'packages (npm/cli#4828). To repair it, delete node_modules and package-lock.json and run ' +
    `"npm install" again, or run "npm install ${name}@${version}". If npm finds no such package, ` +
    'this platform is not supported.'
  )
}

function load () {
  const file = find('latzero.node')
  if (file === undefined) throw missing()
  const addon = require(file)
  if (addon.version() !== version) {
    throw new Error(
      `latzero: the addon ${file} has version ${addon.version()}, and the package latzero has ` +
      `version ${version}. Install both in the same version.`
    )
  }
  return addon
}

module.exports = { find, load, manifest, mayLoop, missing }
