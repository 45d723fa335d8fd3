//! The production code of `src/`, read as tokens, for the tests of its structure and of its texts.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// A production source file.
pub(crate) struct Source {
    /// `probe::driver` for `src/probe/driver.rs`.
    pub(crate) module: String,
    /// The file's tokens, excluding comments and `#[cfg(test)]` items; a pair of colons is one word. A doc comment is
    /// the literal of its attribute, as the compiler sees it.
    pub(crate) words: Vec<String>,
}

impl Source {
    /// Every file of `src/`, excluding the modules for tests. They are parsed once, because that takes a second.
    pub(crate) fn all() -> &'static [Self] {
        static ALL: LazyLock<Vec<Source>> = LazyLock::new(Source::parse_all);
        &ALL
    }

    fn parse_all() -> Vec<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut files = Vec::new();
        collect(&root, &mut files);
        let mut test_modules = Vec::new();
        let mut sources = Vec::new();
        for file in files {
            let name = file.strip_prefix(&root).unwrap().with_extension("");
            let module = name.to_str().unwrap().replace('/', "::");
            let (words, tests) = production(&fs::read_to_string(&file).unwrap());
            // A module that lib.rs declares stands beside lib.rs, not below it.
            let parent = match module.as_str() {
                "lib" => String::new(),
                parent => format!("{parent}::"),
            };
            test_modules.extend(tests.iter().map(|test| format!("{parent}{test}")));
            sources.push(Self { module, words });
        }
        let is_test = |module: &str| {
            let mut tests = test_modules.iter();
            tests.any(|test| module == test || module.starts_with(&format!("{test}::")))
        };
        sources.retain(|source| !is_test(&source.module));
        sources
    }

    /// Whether these words follow one another in the code.
    pub(crate) fn contains(&self, words: &[&str]) -> bool {
        self.words.windows(words.len()).any(|run| run == words)
    }
}

/// The words of the production code, and the names of the modules for tests.
pub(crate) fn production(code: &str) -> (Vec<String>, Vec<String>) {
    let (mut words, mut tests) = (Vec::new(), Vec::new());
    flatten(code.parse().unwrap(), &mut words, &mut tests);
    (words, tests)
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

fn flatten(code: TokenStream, words: &mut Vec<String>, tests: &mut Vec<String>) {
    let mut tokens = code.into_iter().peekable();
    while let Some(token) = tokens.next() {
        match token {
            TokenTree::Punct(punct) if punct.as_char() == '#' => {
                if tokens.next_if(is_cfg_test).is_some() {
                    tests.extend(skip_item(&mut tokens));
                } else {
                    words.push("#".to_owned());
                }
            }
            TokenTree::Group(group) => {
                let [open, close] = match group.delimiter() {
                    Delimiter::Brace => ["{", "}"],
                    Delimiter::Parenthesis => ["(", ")"],
                    Delimiter::Bracket => ["[", "]"],
                    Delimiter::None => ["", ""],
                };
                words.push(open.to_owned());
                flatten(group.stream(), words, tests);
                words.push(close.to_owned());
            }
            TokenTree::Punct(punct) if punct.as_char() == ':' => match words.last_mut() {
                Some(last) if last == ":" => "::".clone_into(last),
                _ => words.push(":".to_owned()),
            },
            token => words.push(token.to_string()),
        }
    }
}

fn is_cfg_test(token: &TokenTree) -> bool {
    token.to_string().replace(' ', "") == "[cfg(test)]"
}

/// Skips an item up to its semicolon or its braces; returns its name if it is a module: its files are for tests, too.
fn skip_item(tokens: &mut impl Iterator<Item = TokenTree>) -> Option<String> {
    let mut words = Vec::new();
    for token in tokens {
        match &token {
            TokenTree::Group(group) if group.delimiter() == Delimiter::Brace => break,
            TokenTree::Punct(punct) if punct.as_char() == ';' => break,
            _ => words.push(token.to_string()),
        }
    }
    match &words[..] {
        [.., keyword, name] if keyword == "mod" => Some(name.clone()),
        _ => None,
    }
}

#[test]
fn items_for_tests_are_left_out_and_what_follows_them_is_not() {
    let code = "use crate::a;
        #[cfg(test)] use crate::hidden::A;
        #[cfg(test)] #[expect(dead_code)] mod tests { use crate::hidden::B; }
        #[cfg(test)] mod beside;
        fn f() { let text = \"shown\"; }";
    let (words, tests) = production(code);
    assert_eq!(tests, ["tests", "beside"]);
    let code = words.join(" ");
    assert_eq!(code, "use crate :: a ; fn f ( ) { let text = \"shown\" ; }");
}
