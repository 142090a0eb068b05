#!/usr/bin/env node
'use strict'

// The program `latzero`, from the package of this platform.

const { spawn } = require('node:child_process')

const { find, missing } = require('../lib/addon.cjs')

const program = find('latzero')
if (program === undefined) {
  console.error(missing().message)
  process.exit(1)
}
const child = spawn(program, process.argv.slice(2), { stdio: 'inherit' })
const signals = ['SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGUSR2']
for (const signal of signals) process.on(signal, () => child.kill(signal))
child.on('error', (error) => {
  console.error(`latzero: ${program}: ${error.message}`)
  process.exit(1)
})
child.on('exit', (status, signal) => {
  if (signal === null) process.exit(status)
  // This process ends as its child did.
  for (const known of signals) process.removeAllListeners(known)
  process.kill(process.pid, signal)
})
