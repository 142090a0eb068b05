'use strict'

// A private server for tests: `const server = await latzero.testing.server()`.

const { spawn } = require('node:child_process')
const { mkdtempSync, rmSync } = require('node:fs')
const { once } = require('node:events')
const { tmpdir } = require('node:os')
const { join } = require('node:path')
const { createInterface } = require('node:readline')

const { find } = require('./addon.cjs')

/** What a server says when it is ready: its pin, its address and its socket. */
const READY = /^latzero ready .*?(?: pin (\S+))? (?:tcp|tls):\/\/(\S+) unix:(\S+)/

/** The program `latzero`: `LATZERO_BIN`, else the package's own, else the one in `PATH`. */
function findProgram () {
  return process.env.LATZERO_BIN || find('latzero') || 'latzero'
}

/** A running server with a data directory and a port of its own. */
class Server {
  #args
  #child
  #kill = () => this.#child?.kill('SIGKILL')

  constructor (args) {
    this.#args = args
    this.dataDir = mkdtempSync(join(tmpdir(), 'latzero-'))
  }

  async start () {
    // It is private: nothing that is meant for another server or app says how it runs.
    const env = { ...process.env }
    for (const name of Object.keys(env)) {
      if (name.startsWith('LATZERO_') && name !== 'LATZERO_BIN') delete env[name]
    }
    const args = ['start', '--port', '0', '--log-level', 'warn', '--data-dir', this.dataDir]
    const child = spawn(findProgram(), [...args, ...this.#args], {
      env,
      stdio: ['ignore', 'pipe', 'inherit']
    })
    this.#child = child
    process.once('exit', this.#kill)
    const lines = createInterface({ input: child.stdout })
    const failed = new Promise((resolve, reject) => {
      child.once('error', ({ code, message }) => reject(new Error(code === 'ENOENT'
        ? 'the program `latzero` was not found; name it in LATZERO_BIN'
        : message)))
      child.once('exit', (status) => {
        reject(new Error(`the server did not start (status ${status})`))
      })
    })
    failed.catch(() => {})
    const ready = new Promise((resolve) => {
      lines.on('line', (line) => {
        const found = READY.exec(line)
        if (found !== null) resolve(found)
      })
    })
    try {
      [, this.pin, this.address, this.socket] = await Promise.race([ready, failed])
    } catch (error) {
      process.removeListener('exit', this.#kill)
      throw error
    }
    // A test that forgets it ends all the same.
    child.unref()
    child.stdout.unref()
  }

  /** The address for the app `appId`. */
  url (appId, pool = 'default') {
    return `latzero://${appId}?socket=${encodeURIComponent(this.socket)}&pool=${pool}`
  }

  /** Kills the server, as a crash does. */
  async kill () {
    const child = this.#child
    if (child === undefined) return
    this.#child = undefined
    process.removeListener('exit', this.#kill)
    if (child.exitCode !== null || child.signalCode !== null) return
    child.ref()
    const exit = once(child, 'exit')
    child.kill('SIGKILL')
    await exit
  }

  /** Kills the server and starts it again, with the same data. */
  async restart () {
    await this.kill()
    await this.start()
  }

  /** Kills the server and removes its data. */
  async close () {
    await this.kill()
    rmSync(this.dataDir, { recursive: true, force: true })
  }

  [Symbol.asyncDispose] () {
    return this.close()
  }
}

/** Starts a server; `args` are further arguments of `latzero start`. */
async function server (...args) {
  const server = new Server(args)
  try {
    await server.start()
  } catch (error) {
    await server.close()
    throw error
  }
  return server
}

module.exports = { findProgram, server }
