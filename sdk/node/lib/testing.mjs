// `latzero/testing` for `import`: the same objects as for `require`.

import testing from './testing.cjs'

export const { findProgram, server } = testing
