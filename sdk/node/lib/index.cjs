'use strict'

// The package `latzero`: calls, events and shared memory between the programs of one machine.

const { connect } = require('./app.cjs')
const { writable } = require('./block.cjs')
const errors = require('./errors.cjs')

module.exports = {
  connect,
  writable,
  LatZeroError: errors.LatZeroError,
  UnavailableError: errors.UnavailableError,
  TimeoutError: errors.TimeoutError,
  CancelledError: errors.CancelledError,
  DisconnectedError: errors.DisconnectedError,
  HandlerFailedError: errors.HandlerFailedError,
  ForbiddenError: errors.ForbiddenError,
  BadRequestError: errors.BadRequestError,
  BlockError: errors.BlockError,
  ServerFailedError: errors.ServerFailedError,
  CryptoFailedError: errors.CryptoFailedError,
  Failure: errors.Failure
}
