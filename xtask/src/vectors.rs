//! The examples of `docs/protocol.md` as conformance vectors that every language can run.
//!
//! A block that begins with ```` ```conformance NAME ```` has one step per line:
//!
//! ```text
//! alice > {"action":"ping","id":"1"}      alice sends this message
//! alice < {"in_reply_to":"1"}             alice receives a message with at least these fields
//! alice > {"action":"emit"} + 00ff        … as an attachment frame with these bytes; `<` likewise
//! alice > hex 00000000                    alice sends these bytes
//! alice closed                            the server closes alice's connection
//! alice disconnects                       alice closes it
//! ```

use serde_json::{Value, json};

/// One conformance vector.
pub(crate) struct Vector {
    pub(crate) name: String,
    steps: Vec<Value>,
}

impl Vector {
    /// The name as a file name.
    pub(crate) fn file_name(&self) -> String {
        self.name
            .to_lowercase()
            .replace(|c: char| !c.is_ascii_alphanumeric(), "_")
    }

    /// The vector as written to its file.
    pub(crate) fn to_json(&self) -> String {
        let vector = json!({"name": self.name, "steps": self.steps});
        serde_json::to_string_pretty(&vector).expect("values can be written") + "\n"
    }
}

/// The vectors of a document.
pub(crate) fn of_document(text: &str) -> Result<Vec<Vector>, String> {
    let mut vectors = Vec::new();
    let mut current: Option<Vector> = None;
    for (i, line) in text.lines().enumerate() {
        let at = |what: String| format!("docs/protocol.md:{}: {what}", i + 1);
        if let Some(name) = line.strip_prefix("```conformance ") {
            current = Some(Vector {
                name: name.trim().to_owned(),
                steps: Vec::new(),
            });
        } else if line.starts_with("```") {
            vectors.extend(current.take());
        } else if let Some(vector) = &mut current {
            vector.steps.push(step(line).map_err(at)?);
        }
    }
    Ok(vectors)
}

fn step(line: &str) -> Result<Value, String> {
    let (who, rest) = line
        .split_once(' ')
        .ok_or("a step is `NAME > …`, `NAME < …`, `NAME closed` or `NAME disconnects`")?;
    let parse = |json: &str| serde_json::from_str::<Value>(json).map_err(|error| error.to_string());
    match rest.split_once(' ') {
        Some((">", hex)) if hex.starts_with("hex ") => {
            Ok(json!({"connection": who, "send_hex": &hex[4..]}))
        }
        Some((direction @ (">" | "<"), message)) => {
            let (message, raw) = match message.rsplit_once(" + ") {
                Some((message, raw)) => (message, Some(raw)),
                None => (message, None),
            };
            let verb = if direction == ">" { "send" } else { "receive" };
            let mut step = json!({"connection": who, verb: parse(message)?});
            if let Some(raw) = raw {
                step["raw_hex"] = raw.into();
            }
            Ok(step)
        }
        None if rest == "closed" => Ok(json!({"connection": who, "closed": true})),
        None if rest == "disconnects" => Ok(json!({"connection": who, "disconnect": true})),
        _ => Err(format!("not a step: {line}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_parsed() {
        let text = "x\n```conformance a b\na > {\"x\":1}\na < {}\na > hex 00\na > {} + 00ff\na \
                    closed\na disconnects\n```\n";
        let vectors = of_document(text).unwrap();
        assert_eq!((vectors.len(), vectors[0].steps.len()), (1, 6));
        assert_eq!(vectors[0].steps[3]["raw_hex"], "00ff");
        assert_eq!(vectors[0].file_name(), "a_b");
        assert!(of_document("```conformance a\nnonsense\n```").is_err());
    }
}
