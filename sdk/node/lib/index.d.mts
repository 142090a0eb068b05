// The types of the package `latzero`.

export * from './index.cjs'
