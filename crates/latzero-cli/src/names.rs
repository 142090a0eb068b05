//! Finds known names that resemble an unknown one.

/// Below this similarity (0 to 1) a hint would mislead.
const SIMILAR_MIN: f64 = 0.75;

/// How many names are suggested at most.
const NAMES_MAX: usize = 3;

/// Names longer than any valid one are compared by their beginning, so that the cost stays bounded.
const CHARS_MAX: usize = 128;

/// The names in `known` that resemble `name` most, the nearest first.
pub(crate) fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let name: String = name.chars().take(CHARS_MAX).collect();
    let mut found: Vec<(f64, &str)> = known
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(&name, candidate), candidate))
        .filter(|(similarity, _)| *similarity >= SIMILAR_MIN)
        .collect();
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(b.1)));
    found.dedup_by_key(|(_, candidate)| *candidate);
    found
        .into_iter()
        .take(NAMES_MAX)
        .map(|(_, candidate)| candidate)
        .collect()
}

/// `did you mean a, b or c?`
pub(crate) fn did_you_mean(names: &[&str]) -> Option<String> {
    let (last, others) = names.split_last()?;
    Some(match others {
        [] => format!("did you mean {last}?"),
        others => format!("did you mean {} or {last}?", others.join(", ")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_found() {
        assert_eq!(nearest("duble", ["double", "triple", "time"]), ["double"]);
        assert!(nearest("zzz", ["double", "triple"]).is_empty());
        assert_eq!(did_you_mean(&["a"]).unwrap(), "did you mean a?");
        assert_eq!(
            did_you_mean(&["a", "b", "c"]).unwrap(),
            "did you mean a, b or c?"
        );
        assert_eq!(did_you_mean(&[]), None);
    }
}
