//! The documents of `docs/`, which the binary carries: an engineer who was just paged needs no other host for them.

use std::borrow::Cow;
use std::fmt::Write as _;

use maud::{Markup, PreEscaped, html};
use pulldown_cmark::{Alignment, CowStr, Event, Options, Parser, Tag, TagEnd};

use super::layout::{Page, Tone};
use crate::config::REPOSITORY;

macro_rules! docs {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_str!(concat!("../../../docs/", $name, ".md")))),*]
    };
}

const DOCS: [(&str, &str); 8] = docs![
    "reasons",
    "alerts",
    "operate",
    "configure",
    "metrics",
    "api",
    "exit-status",
    "architecture",
];

/// What a reason means and what to do about it, in Markdown.
pub(super) struct Advice {
    means: &'static str,
    what_to_do: &'static str,
}

impl Advice {
    /// From the table of reasons; `None` for a reason that this version doesn't know.
    pub(super) fn of(reason: &str) -> Option<Self> {
        let (_, reasons) = DOCS.iter().find(|(name, _)| *name == "reasons")?;
        let begin = format!("| [`{reason}`](#{reason}) | ");
        let row = reasons.lines().find_map(|line| line.strip_prefix(&begin))?;
        let mut cells = row.trim_end_matches(" |").split(" | ").skip(1);
        Some(Self {
            means: cells.next()?,
            what_to_do: cells.next()?,
        })
    }

    /// `root` is the path from the page to the first one.
    pub(super) fn render(&self, reason: &str, root: &str) -> Markup {
        html! {
            p .advice {
                b { "Meaning: " } (inline(self.means)) " "
                b { "What to do: " } (inline(self.what_to_do)) " "
                a href={ (root) "docs/reasons#" (reason) } { "More about " (reason) }
            }
        }
    }
}

/// The page of a document; `None` if there is none of this name.
pub(super) fn render(name: &str) -> Option<String> {
    let (_, text) = DOCS.iter().find(|(known, _)| *known == name)?;
    let title = text.lines().next()?.trim_start_matches("# ");
    let content = html! {
        nav aria-label="Documents" { @for (name, _) in DOCS { a href=(name) { (name) } " " } }
        article { (markdown(text)) }
    };
    let page = Page {
        root: "../",
        verdict: title,
        tone: Tone::Neutral,
        live: false,
        content,
    };
    Some(page.render())
}

/// One line of Markdown without its paragraph.
fn inline(text: &str) -> Markup {
    let Markup { 0: paragraph } = markdown(text);
    let line = paragraph.trim_end().trim_start_matches("<p>");
    PreEscaped(line.trim_end_matches("</p>").to_owned())
}

/// Our own documents, so nothing in them is hostile. Without their title, which is the verdict of the page.
fn markdown(text: &str) -> Markup {
    let events: Vec<_> = Parser::new_ext(text, Options::ENABLE_TABLES).collect();
    let mut events = without_title(&events).to_vec();
    for index in 0..events.len() {
        if matches!(events[index], Event::Start(Tag::Heading { .. })) {
            let slug = slug(&events[index + 1..]);
            if let Event::Start(Tag::Heading { id, .. }) = &mut events[index] {
                *id = Some(slug.into());
            }
        }
        if let Event::Start(Tag::Link { dest_url, .. }) = &mut events[index] {
            *dest_url = link(dest_url);
        }
        // Aligned columns would be inline styles, which the pages forbid.
        if let Event::Start(Tag::Table(alignments)) = &mut events[index] {
            alignments.fill(Alignment::None);
        }
    }
    let events = events.into_iter().flat_map(|event| match event {
        Event::Start(Tag::Table(_)) => vec![Event::Html("<div class=\"scroll\">".into()), event],
        Event::End(TagEnd::Table) => vec![event, Event::Html("</div>".into())],
        other => vec![other],
    });
    let mut html = String::new();
    pulldown_cmark::html::push_html(&mut html, events);
    PreEscaped(html)
}

fn without_title<'a, 'b>(events: &'a [Event<'b>]) -> &'a [Event<'b>] {
    let is_end =
        |event: &Event<'_>| *event == Event::End(TagEnd::Heading(pulldown_cmark::HeadingLevel::H1));
    let end = events.iter().position(is_end);
    &events[end.map_or(0, |end| end + 1)..]
}

/// The anchor of a heading, as code hosts make it: `### Plan limits` is `plan-limits`.
fn slug(heading: &[Event<'_>]) -> String {
    let text = heading
        .iter()
        .take_while(|event| !matches!(event, Event::End(TagEnd::Heading(_))));
    let mut slug = String::new();
    for event in text {
        let (Event::Text(text) | Event::Code(text)) = event else {
            continue;
        };
        for char in text.chars() {
            match char {
                ' ' => slug.push('-'),
                '-' | '_' => slug.push(char),
                other if other.is_alphanumeric() => slug.extend(other.to_lowercase()),
                _ => {}
            }
        }
    }
    slug
}

/// Another document is another page. Other files of the repository lie on the project's host.
fn link<'a>(target: &CowStr<'a>) -> CowStr<'a> {
    let (path, anchor) = target
        .split_once('#')
        .map_or((&**target, ""), |(path, anchor)| (path, anchor));
    let url: Cow<'_, str> = if let Some(file) = path.strip_prefix("../") {
        format!("{REPOSITORY}/{file}").into()
    } else {
        path.trim_end_matches(".md").into()
    };
    let mut url = url.into_owned();
    if !anchor.is_empty() {
        let _ = write!(url, "#{anchor}");
    }
    url.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::Reason;

    #[test]
    fn every_reason_has_its_meaning_its_advice_and_its_section() {
        let reasons = render("reasons").unwrap();
        for reason in Reason::ALL {
            let label = reason.label();
            let advice = Advice::of(label).unwrap();
            let shown = advice.render(label, "../").into_string();
            assert!(
                advice.means.ends_with('.') && advice.what_to_do.ends_with('.'),
                "{label}"
            );
            assert!(!shown.contains('`') && !shown.contains('|'), "{shown}");
            assert!(reasons.contains(&format!("<h3 id=\"{label}\">")), "{label}");
        }
        assert!(Advice::of("agent").is_none());
        assert!(Advice::of("<script>").is_none());
    }

    #[test]
    fn links_between_documents_lead_to_a_page_and_an_anchor_that_exist() {
        let pages: Vec<_> = DOCS
            .iter()
            .map(|(name, _)| (*name, render(name).unwrap()))
            .collect();
        let mut links = 0;
        for (from, page) in &pages {
            for link in page
                .split(" href=\"")
                .skip(1)
                .map(|rest| rest.split('"').next().unwrap())
            {
                if link.starts_with("../")
                    || link.starts_with("https://")
                    || link.starts_with("http://")
                {
                    continue;
                }
                let (name, anchor) = link.split_once('#').unwrap_or((link, ""));
                let name = if name.is_empty() { from } else { name };
                let to = pages.iter().find(|(known, _)| *known == name);
                let (_, to) = to.unwrap_or_else(|| panic!("{from} links to {link}"));
                let id = format!(" id=\"{anchor}\"");
                assert!(
                    anchor.is_empty() || to.contains(&id),
                    "{from} links to {link}"
                );
                links += 1;
            }
        }
        assert!(links > 50, "{links}");
    }

    #[test]
    fn every_document_is_a_page() {
        let mut names: Vec<_> = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/docs"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        let mut known: Vec<_> = DOCS.iter().map(|(name, _)| format!("{name}.md")).collect();
        names.sort();
        known.sort();
        assert_eq!(names, known);
        assert!(render("Cargo").is_none());
    }
}
