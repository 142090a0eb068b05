//! Policies of pools: who may do what in one.
//!
//! A policy has a rule for each right that it restricts. A rule allows some, or everybody but those
//! that it denies. They are named by AppID, by user (`uid:1000`), or by the key that the app proved
//! (`key:…`, its public key): an AppID alone is only as good as whoever used it first. A rule that
//! denies a user also denies apps whose user is unknown, because that user could connect over TCP.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

use crate::envelope::{Raw, mistyped};
use crate::error::{Code, Refusal};
use crate::limits::PERMISSION_APPS_MAX;
use crate::message::Fields;
use crate::name::AppId;

/// Something that a policy may restrict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Right {
    /// To be a member.
    Join,
    /// To serve and listen.
    Serve,
    /// To call.
    Call,
    /// To emit.
    Emit,
    /// To read blocks.
    Read,
    /// To create, write and remove blocks.
    Write,
}

impl Right {
    /// Every right, in the order of its bit in [`Rights`].
    pub const ALL: [Right; 6] = [
        Right::Join,
        Right::Serve,
        Right::Call,
        Right::Emit,
        Right::Read,
        Right::Write,
    ];

    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Right::Join => "join",
            Right::Serve => "serve",
            Right::Call => "call",
            Right::Emit => "emit",
            Right::Read => "read",
            Right::Write => "write",
        }
    }
}

/// What one app may do in a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rights(u8);

impl Rights {
    /// Everything.
    pub const ALL: Rights = Rights((1 << Right::ALL.len()) - 1);

    /// Whether a right is among them.
    #[must_use]
    pub fn have(self, right: Right) -> bool {
        self.0 & (1 << right as u8) != 0
    }
}

/// An app on one connection, as policies know it.
#[derive(Debug, Clone, Copy)]
pub struct Actor<'a> {
    /// Its AppID.
    pub app: &'a AppId,
    /// Its user, if the kernel reports it: on a Unix socket.
    pub uid: Option<u32>,
    /// Its public key, if it proved one.
    pub key: Option<&'a [u8; 32]>,
}

/// Most subjects of one list.
const SUBJECTS_MAX: usize = PERMISSION_APPS_MAX;

/// Whom a rule names.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Subject {
    Anybody,
    App(AppId),
    Uid(u32),
    Key([u8; 32]),
}

impl Subject {
    fn parse(text: &str) -> Result<Subject, Refusal> {
        let wrong = |what: &str| Refusal::new(Code::BadMessage, format!("'{text}' is not {what}"));
        if text == "*" {
            return Ok(Subject::Anybody);
        }
        if let Some(uid) = text.strip_prefix("uid:") {
            let uid = uid.parse().map_err(|_| wrong("a user: write uid:NUMBER"))?;
            return Ok(Subject::Uid(uid));
        }
        if let Some(key) = text.strip_prefix("key:") {
            let key = URL_SAFE_NO_PAD.decode(key).ok();
            let key = key.and_then(|key| <[u8; 32]>::try_from(key).ok());
            let key = key.ok_or_else(|| wrong("a key: write key: and an app's public key"))?;
            return Ok(Subject::Key(key));
        }
        AppId::new(text).map(Subject::App).map_err(Refusal::from)
    }

    fn is(&self, actor: &Actor<'_>) -> bool {
        match self {
            Subject::Anybody => true,
            Subject::App(app) => app == actor.app,
            Subject::Uid(uid) => actor.uid == Some(*uid),
            Subject::Key(key) => actor.key == Some(key),
        }
    }
}

impl Serialize for Subject {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Subject::Anybody => to.serialize_str("*"),
            Subject::App(app) => to.serialize_str(app.as_str()),
            Subject::Uid(uid) => to.collect_str(&format_args!("uid:{uid}")),
            Subject::Key(key) => {
                to.collect_str(&format_args!("key:{}", URL_SAFE_NO_PAD.encode(key)))
            }
        }
    }
}

/// Who has a right: those that are allowed, without those that are denied.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    /// Absent means everybody.
    allow: Option<Vec<Subject>>,
    deny: Vec<Subject>,
}

impl Rule {
    /// Reads a list of those that are allowed, or an object with the lists `allow` and `deny`.
    fn parse(fields: &Fields<'_>, right: Right) -> Result<Option<Rule>, Refusal> {
        let name = right.as_str();
        let Some(raw) = fields.field(name) else {
            return Ok(None);
        };
        let (allow, deny) = if raw.is_object() {
            let lists = Fields::of_item(raw)?;
            lists.check_names("a rule of a policy", &["allow", "deny"])?;
            (subjects(&lists, "allow")?, subjects(&lists, "deny")?)
        } else {
            (subjects(fields, name)?, None)
        };
        let allow = allow.filter(|allow| !allow.contains(&Subject::Anybody));
        let deny = deny.unwrap_or_default();
        Ok((allow.is_some() || !deny.is_empty()).then_some(Rule { allow, deny }))
    }

    fn allows(&self, actor: &Actor<'_>) -> bool {
        let is_allowed = |allow: &[Subject]| allow.iter().any(|subject| subject.is(actor));
        let is_denied = |subject: &Subject| match subject {
            // Otherwise that user could get in over TCP.
            Subject::Uid(_) if actor.uid.is_none() => true,
            subject => subject.is(actor),
        };
        self.allow.as_deref().is_none_or(is_allowed) && !self.deny.iter().any(is_denied)
    }

    fn to_json(&self) -> Value {
        match (&self.allow, &self.deny[..]) {
            (Some(allow), []) => json!(allow),
            (Some(allow), deny) => json!({"allow": allow, "deny": deny}),
            (None, deny) => json!({"deny": deny}),
        }
    }
}

/// A list of at most [`SUBJECTS_MAX`] subjects.
fn subjects(fields: &Fields<'_>, name: &str) -> Result<Option<Vec<Subject>>, Refusal> {
    let mut subjects = Vec::new();
    let is_there = fields.each_string(name, |text| {
        if subjects.len() == SUBJECTS_MAX {
            let text = format!("field '{name}' of a policy names more than {SUBJECTS_MAX}");
            return Err(Refusal::new(Code::TooLarge, text));
        }
        subjects.push(Subject::parse(text)?);
        Ok(())
    })?;
    Ok(is_there.then_some(subjects))
}

/// Who may do what in a pool. Its owner may do everything.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policy {
    /// By right; everybody has those without a rule.
    rules: [Option<Rule>; Right::ALL.len()],
}

/// Bytes that each subject of a rule takes in addition to its text.
const SUBJECT_BYTES: usize = 80;

impl Policy {
    /// About how many bytes of memory it takes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let text = |subject: &Subject| match subject {
            Subject::App(app) => app.as_str().len(),
            Subject::Anybody | Subject::Uid(_) | Subject::Key(_) => 0,
        };
        let rules = self.rules.iter().flatten();
        let subjects = rules.flat_map(|rule| rule.allow.iter().flatten().chain(&rule.deny));
        subjects.map(|subject| text(subject) + SUBJECT_BYTES).sum()
    }

    /// Reads the field `policy`.
    ///
    /// # Errors
    /// `bad_message`, `invalid_name`, `too_large`.
    pub fn parse(raw: Raw<'_>) -> Result<Policy, Refusal> {
        if !raw.is_object() {
            return Err(mistyped("policy", "an object", raw));
        }
        let fields = Fields::of(raw.text())?;
        fields.check_names("a policy", &Right::ALL.map(Right::as_str))?;
        let mut policy = Policy::default();
        for (rule, right) in policy.rules.iter_mut().zip(Right::ALL) {
            *rule = Rule::parse(&fields, right)?;
        }
        Ok(policy)
    }

    /// A policy under which only the owner may do anything.
    #[must_use]
    pub fn closed() -> Policy {
        let nobody = Rule {
            allow: Some(Vec::new()),
            deny: Vec::new(),
        };
        Policy {
            rules: Right::ALL.map(|_| Some(nobody.clone())),
        }
    }

    /// What an app may do.
    #[must_use]
    pub fn rights(&self, actor: &Actor<'_>) -> Rights {
        let allowed = Right::ALL.into_iter();
        let allowed = allowed.filter(|right| self.allows(*right, actor));
        Rights(allowed.fold(0, |bits, right| bits | 1 << right as u8))
    }

    /// Whether an app has a right; only its rule is evaluated.
    #[must_use]
    pub fn allows(&self, right: Right, actor: &Actor<'_>) -> bool {
        let rule = self.rules[right as usize].as_ref();
        rule.is_none_or(|rule| rule.allows(actor))
    }

    /// The field on the wire: a rule for each right that is restricted.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let rules = Right::ALL.iter().zip(&self.rules);
        let rules = rules.filter_map(|(right, rule)| {
            Some((right.as_str().to_owned(), rule.as_ref()?.to_json()))
        });
        Value::Object(rules.collect::<Map<_, _>>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Policy, Refusal> {
        Policy::parse(Raw::new(text).unwrap())
    }

    const KEY: &str = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE";

    #[test]
    fn a_rule_allows_some_or_denies_some() {
        let text = format!(
            r#"{{"join":["a","uid:7","key:{KEY}"],"call":{{"deny":["a"]}},
            "emit":{{"allow":["*"],"deny":["uid:7"]}},"read":["*"],"write":[]}}"#
        );
        let policy = parse(&text).unwrap();
        let may = |app: &str, uid: Option<u32>, key: Option<&[u8; 32]>| {
            let app = AppId::new(app).unwrap();
            let rights = policy.rights(&Actor {
                app: &app,
                uid,
                key,
            });
            Right::ALL.map(|right| rights.have(right))
        };
        // Join, serve, call, emit, read, write.
        assert_eq!(
            may("a", Some(1), None),
            [true, true, false, true, true, false]
        );
        assert_eq!(
            may("b", Some(1), None),
            [false, true, true, true, true, false]
        );
        let over_tcp = may("b", None, None);
        assert_eq!(over_tcp, [false, true, true, false, true, false]);
        assert_eq!(
            may("b", Some(7), None),
            [true, true, true, false, true, false]
        );
        let keyed = may("b", Some(8), Some(&[1; 32]));
        assert_eq!(keyed, [true, true, true, true, true, false]);
        assert!(!may("b", None, Some(&[2; 32]))[0]);
        let app = AppId::new("a").unwrap();
        let actor = Actor {
            app: &app,
            uid: None,
            key: None,
        };
        assert_eq!(Policy::default().rights(&actor), Rights::ALL);
        assert!(
            !Right::ALL
                .iter()
                .any(|right| Policy::closed().allows(*right, &actor))
        );
    }

    #[test]
    fn it_is_stored_as_it_was_given() {
        for text in [
            "{}",
            r#"{"join":["bob"],"serve":["alice"]}"#,
            r#"{"call":{"deny":["uid:0"]},"write":{"allow":["a"],"deny":["b"]}}"#,
        ] {
            let policy = parse(text).unwrap();
            assert_eq!(
                policy.to_json(),
                serde_json::from_str::<Value>(text).unwrap()
            );
            assert_eq!(parse(&policy.to_json().to_string()).unwrap(), policy);
        }
        assert_eq!(
            parse(r#"{"join":["a","*"],"call":null}"#).unwrap(),
            Policy::default()
        );
        for wrong in [
            "[]",
            r#"{"join":"a"}"#,
            r#"{"join":[7]}"#,
            r#"{"calls":[]}"#,
            r#"{"call":{"allowed":[]}}"#,
            r#"{"join":["a b"]}"#,
            r#"{"join":["uid:-1"]}"#,
            r#"{"join":["uid:"]}"#,
            r#"{"join":["key:AQ"]}"#,
            r#"{"join":{"deny":"a"}}"#,
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        let many = vec!["a"; SUBJECTS_MAX + 1];
        let error = parse(&json!({"join": {"deny": many}}).to_string()).unwrap_err();
        assert_eq!(error.code, Code::TooLarge);
    }
}
