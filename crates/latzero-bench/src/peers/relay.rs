//! A relay of plain bytes: the cost of the sockets and the scheduler, and nothing else.
//!
//! The server copies bytes between its first connection (the handler) and its second one (the
//! caller). Only the two clients parse anything: the length, to know when a message is complete.

use super::Peer;
use crate::failure::Failure;
use crate::frame::{self, Input};
use crate::plan::{Outcome, Plan};
use crate::process::announce;
use crate::stream::{Calls, Stream, Transport, run_calls, run_handler};
use crate::switch::{self, Outboxes, Switch};
use std::path::Path;

/// The bare relay over one kind of socket.
pub(crate) struct Relay(pub(crate) Transport);

impl Peer for Relay {
    fn name(&self) -> &'static str {
        match self.0 {
            Transport::Tcp => "relay-tcp",
            Transport::Unix => "relay-unix",
        }
    }

    fn transport(&self) -> Transport {
        self.0
    }

    fn serve(&self, scratch: &Path) -> Result<(), Failure> {
        switch::serve(self.0, scratch, &mut Pipe)
    }

    fn handle(&self, address: &str) -> Result<(), Failure> {
        let mut stream = Stream::connect(self.0, address)?;
        // Connections are accepted in the order in which they were made, so the caller cannot
        // overtake this one.
        announce(address)?;
        let response = same_response();
        run_handler(&mut stream, &mut Input::new(), |input, out| {
            while input.next_frame()?.is_some() {
                out.extend_from_slice(&response);
            }
            Ok(())
        })
    }

    fn call(&self, address: &str, plan: &Plan) -> Result<Outcome, Failure> {
        let mut call = Vec::new();
        frame::append_call(&mut call, frame::FIRST_ID);
        let mut calls = SameCall {
            call,
            response: same_response(),
        };
        run_calls(&mut Stream::connect(self.0, address)?, &mut calls, plan)
    }
}

fn same_response() -> Vec<u8> {
    let mut response = Vec::new();
    let id = frame::FIRST_ID.to_string();
    frame::append_response(&mut response, &id, "ok", frame::PAYLOAD);
    response
}

struct Pipe;

impl Switch for Pipe {
    fn switch(
        &mut self,
        from: usize,
        input: &mut Input,
        out: &mut Outboxes,
    ) -> Result<(), Failure> {
        out.touch(1 - from.min(1))?
            .extend_from_slice(input.take_all());
        Ok(())
    }
}

struct SameCall {
    call: Vec<u8>,
    response: Vec<u8>,
}

impl Calls for SameCall {
    fn append_call(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.call);
    }

    fn take_answers(&mut self, input: &mut Input) -> Result<u64, Failure> {
        let mut count = 0;
        while let Some(body) = input.next_frame()? {
            if !self.response.ends_with(body) {
                return Err(Failure::said("the relay changed an answer on its way"));
            }
            count += 1;
        }
        Ok(count)
    }
}
