// The package `latzero` for `import`: the same objects as for `require`.

import latzero from './index.cjs'

export const {
  connect,
  writable,
  LatZeroError,
  UnavailableError,
  TimeoutError,
  CancelledError,
  DisconnectedError,
  HandlerFailedError,
  ForbiddenError,
  BadRequestError,
  BlockError,
  ServerFailedError,
  CryptoFailedError,
  Failure
} = latzero
