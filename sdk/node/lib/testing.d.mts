// The types of `latzero/testing`.

export * from './testing.cjs'
