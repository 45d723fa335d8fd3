//! The state of a target as a small picture, for a README or a wiki.

use maud::html;

/// The badge as SVG. It has neither scripts nor links, and all text is escaped.
pub(super) fn render(target: &str, state: &str) -> String {
    let colour = match state {
        "healthy" => "#2e7d32",
        "suspect" => "#b26a00",
        "failing" => "#c62828",
        _ => "#6b6b6b",
    };
    let (left, right) = (width(target), width(state));
    let title = format!("{target}: {state}");
    // `textLength` fits the text to the width that was estimated, whatever font the reader has.
    let badge = html! {
        svg xmlns="http://www.w3.org/2000/svg" width=(left + right) height="20" role="img" aria-label=(title) {
            title { (title) }
            rect width=(left + right) height="20" rx="3" fill="#424242" {}
            rect x=(left) width=(right) height="20" rx="3" fill=(colour) {}
            rect x=(left) width="4" height="20" fill=(colour) {}
            g fill="#ffffff" text-anchor="middle" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" {
                text x=(left / 2) y="14" textLength=(left - PADDING) { (target) }
                text x=(left + right / 2) y="14" textLength=(right - PADDING) { (state) }
            }
        }
    };
    badge.into_string()
}

/// Left and right of a text together.
const PADDING: usize = 12;

/// Pixels, by the mean width of a character.
fn width(text: &str) -> usize {
    text.chars().count() * 7 + PADDING
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn badge_shows_the_state_by_word_and_colour_and_escapes_every_text() {
        let badge = render("support", "failing");
        assert!(
            badge.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"122\""),
            "{badge}"
        );
        assert!(badge.contains("<title>support: failing</title>"), "{badge}");
        assert!(badge.contains("#c62828"), "{badge}");
        let hostile = render("a<script>&\"", "healthy");
        assert!(hostile.contains("a&lt;script&gt;&amp;&quot;"), "{hostile}");
        assert!(!hostile.contains("<script"), "{hostile}");
    }
}
