//! N1 to N4: tokens and raw keys.

use latzero_crypto::app_key::AppKey;
use latzero_crypto::keys::{KEY_FILE_BYTES_MAX, KeyError, KeySet, Kind, Token, raw_key};

use crate::common::*;

#[track_caller]
fn refused(tokens: &[&str], why: KeyError) {
    let got = KeySet::from_tokens(tokens.iter().copied()).err();
    assert_eq!(got, Some(why), "{tokens:?}");
}

#[test]
fn n1_a_token_with_any_character_changed_is_refused() {
    let token = text("/keys/expect/token_sigil");
    for at in 0..token.len() {
        for other in *b"Aa0-_=+/ \n.\0" {
            let mut changed = token.as_bytes().to_vec();
            if changed[at] == other {
                continue;
            }
            changed[at] = other;
            let changed = String::from_utf8(changed).expect("it is ASCII");
            let why = Token::parse(&changed).err();
            let expected = if at < 5 {
                KeyError::TokenPrefix
            } else if other.is_ascii_alphanumeric() || other == b'-' || other == b'_' {
                KeyError::Checksum
            } else {
                KeyError::TokenText
            };
            // 52 bytes leave two bits of the last character unused; they must be 0.
            let last = at == token.len() - 1 && why == Some(KeyError::TokenText);
            assert!(last || why == Some(expected), "{changed}: {why:?}");
        }
    }
}

#[test]
fn n1_a_token_of_another_length_or_alphabet_is_refused() {
    let token = text("/keys/expect/token_sigil");
    for length in 0..token.len() {
        assert!(Token::parse(&token[..length]).is_err(), "{length}");
    }
    refused(&[&format!("{token}A")], KeyError::TokenLength);
    refused(&[&format!("{token}=")], KeyError::TokenLength);
    refused(&[&format!(" {token}")], KeyError::TokenPrefix);
    refused(&[&format!("{token}\r")], KeyError::TokenLength);
    // Characters of several bytes, chosen so that the length in bytes is right.
    refused(&[&format!("{}é", &token[..73])], KeyError::TokenText);
    refused(&[&token.to_uppercase()], KeyError::TokenPrefix);
}

#[test]
fn n2_a_prefix_of_another_kind_does_not_fit_the_checksum() {
    let token = text("/keys/expect/token_sigil");
    for prefix in ["lzc1_", "lzo1_", "lzw1_"] {
        refused(&[&format!("{prefix}{}", &token[5..])], KeyError::Checksum);
    }
    for kind in Kind::ALL {
        let wrong = Some(KeyError::WrongKind(kind)).filter(|_| kind != Kind::Sigil);
        assert_eq!(Token::parse_as(kind, token).err(), wrong);
    }
    for prefix in ["lzx1_", "lza1_", "lzs2_", "LZS1_"] {
        refused(
            &[&format!("{prefix}{}", &token[5..])],
            KeyError::TokenPrefix,
        );
    }
}

#[test]
fn n3_tokens_of_two_owners_do_not_belong_together() {
    let (shard, sigil) = (
        text("/keys/expect/token_shard"),
        text("/keys/expect/token_sigil_w"),
    );
    refused(&[shard, sigil], KeyError::Pins);
    refused(&[shard, shard], KeyError::Twice(Kind::Shard));
    refused(&[], KeyError::Missing(Kind::Sigil));
}

#[test]
fn n4_raw_keys_have_32_bytes_that_are_not_text() {
    let check = |bytes: &[u8], why| assert_eq!(raw_key(bytes).err(), why, "{bytes:?}");
    check(&[0; 32], None);
    check(&[0; 31], Some(KeyError::TooShort));
    check(&[0; 33], Some(KeyError::TooLong));
    check(b"", Some(KeyError::TooShort));
    check(
        b"correct horse battery staple 123",
        Some(KeyError::Passphrase),
    );
    check(b"correct horse battery staple 12\n", None);
    check(
        text("/keys/expect/token_sigil").as_bytes(),
        Some(KeyError::TooLong),
    );
    let why = raw_key(b"hunter2")
        .map(|_| ())
        .expect_err("it is too short")
        .to_string();
    assert!(
        why.contains("latzero keys new") && why.contains("keys from-passphrase"),
        "{why}"
    );
    let twice = KeySet::from_raw(&[(Kind::Sigil, &[1; 32]), (Kind::Sigil, &[2; 32])]);
    assert_eq!(twice.err(), Some(KeyError::Twice(Kind::Sigil)));
}

#[test]
fn a_key_file_has_a_token_a_line_and_nothing_else() {
    let (sigil, shard) = (
        text("/keys/expect/token_sigil"),
        text("/keys/expect/token_shard"),
    );
    let good = |text: &str| KeySet::from_file(text.as_bytes()).map(|keys| keys.roles());
    let roles = Some(latzero_crypto::keys::Roles::Read);
    assert_eq!(good(&format!("# vault\n\n{sigil}\r\n{shard}")), Ok(roles));
    for (text, why) in [
        (format!("{sigil} {shard}"), KeyError::TokenLength),
        (format!("{sigil} # mine"), KeyError::TokenLength),
        (format!(" {sigil}"), KeyError::TokenPrefix),
        (format!("{sigil}\nhello"), KeyError::TokenPrefix),
        (format!("\u{feff}{sigil}"), KeyError::TokenPrefix),
        ("# nothing\n".to_owned(), KeyError::Missing(Kind::Sigil)),
        ("#".repeat(KEY_FILE_BYTES_MAX + 1), KeyError::File),
    ] {
        assert_eq!(good(&text).err(), Some(why));
    }
    assert_eq!(KeySet::from_file(b"\xff").err(), Some(KeyError::File));
    assert_eq!(
        KeySet::from_variable(&format!("{sigil}  {shard} ")).map(|keys| keys.roles()),
        Ok(roles)
    );
    assert_eq!(
        KeySet::from_variable(&format!("{sigil}\n{shard}")).err(),
        Some(KeyError::TokenLength)
    );
}

#[test]
fn an_app_key_is_one_line() {
    let key = text("/proofs/app/expect/text");
    assert!(AppKey::parse(&format!("{key}\n")).is_ok());
    for text in [
        "",
        "lza1_",
        &key[..key.len() - 1],
        &format!("{key}="),
        &format!("{key}\n\n"),
        &format!(" {key}"),
        &key.replace("lza1_", "lzs1_"),
        text("/keys/expect/token_sigil"),
    ] {
        assert_eq!(AppKey::parse(text).err(), Some(KeyError::AppKey), "{text}");
    }
    let mut other = key.to_owned();
    other.replace_range(10..11, if &key[10..11] == "A" { "B" } else { "A" });
    assert_eq!(AppKey::parse(&other).err(), Some(KeyError::Checksum));
}

#[test]
fn no_error_quotes_a_key() {
    let secret = &text("/keys/expect/token_sigil")[5..20];
    for error in [
        Token::parse(&format!("lzs1_{secret}"))
            .err()
            .expect("it is truncated"),
        Token::parse(secret).err().expect("it has no prefix"),
        AppKey::parse(&format!("lza1_{secret}"))
            .err()
            .expect("it is truncated"),
    ] {
        let shown = format!("{error} {error:?}");
        assert!(!shown.contains(secret), "{shown}");
    }
}
