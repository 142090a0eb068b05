//! The real program, run as people and scripts run it: one module per part of it, each test with a
//! server and a data directory of its own.

mod blocks;
mod calls;
mod config;
mod documents;
mod inspect;
mod keys;
mod parked;
mod program;
mod serve;
mod server;
mod service;
mod storage;
mod table;
