"""The page's style sheet: Gradio's own variables for surfaces and text, and two hues with a pattern each."""

CSS = """
.gradio-container {
  --lion-own: #a3480b; --lion-new: #0b6b66; --lion-good: #1a6b2f;
  --lion-muted: #52525b; --lion-line: #d4d4d8; --lion-card: #ffffff;
  max-width: 1280px !important;
}
.dark .gradio-container, .gradio-container.dark {
  --lion-own: #ffb454; --lion-new: #5fd6c8; --lion-good: #7ddc92;
  --lion-muted: #b4b4bd; --lion-line: #45454d; --lion-card: #1d1d21;
}
.gradio-container :focus-visible, #lion-query :focus-visible {
  outline: 3px solid var(--lion-new) !important; outline-offset: 1px;
}
.gradio-container footer, .gradio-container footer * { color: var(--lion-muted) !important; }
.gradio-container footer > .divider:first-child { display: none; }
#lion-search { align-self: center; max-height: 3.5rem; }
#lion-examples { gap: .5rem; }
#lion-examples button { flex: 0 1 auto; width: auto; min-width: 0; text-align: left; }
.lion-header h1 { font-size: 1.6rem; margin: 0 0 .25rem; }
.lion-header p { margin: 0; color: var(--lion-muted); }
.lion-header strong { color: var(--body-text-color); }
.lion-section h2, .lion-ranking h2 { font-size: 1.1rem; margin: .75rem 0 .5rem; overflow-wrap: anywhere; }
.lion-small, .lion-legend { display: block; font-size: .85rem; color: var(--lion-muted); margin: .25rem 0; }
.lion-kind {
  font-size: .75rem; font-weight: 400; color: var(--lion-muted);
  border: 1px solid var(--lion-line); border-radius: 4px; padding: 0 .4em;
}
.lion-hidden {
  position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap;
}
.lion-message {
  border-left: 4px solid var(--lion-new); padding: .5rem .75rem; margin: .5rem 0; overflow-wrap: anywhere;
}
.lion-message.error { border-left-color: var(--lion-own); font-weight: 600; }

.lion-legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; }
.lion-legend span { display: inline-flex; align-items: center; gap: .4em; }
.swatch { display: inline-block; width: 1.6em; height: .8em; border-radius: 2px; }
.swatch.own, .lion-bars .own .fill { background: var(--lion-own); }
.swatch.new, .lion-bars .new .fill {
  border: 1px solid var(--lion-new);
  background: repeating-linear-gradient(135deg, var(--lion-new) 0 2px, transparent 2px 6px);
}
.lion-bars { columns: 22rem 2; column-gap: 2.5rem; list-style: none; margin: 0; padding: 0; }
.lion-bars li {
  display: grid; grid-template-columns: minmax(5rem, 9rem) 1fr 3rem; align-items: center; gap: .5rem;
  break-inside: avoid; margin: 0; padding: 1px 0; position: relative;
}
.lion-bars .name { text-align: right; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.lion-bars .own .name { font-weight: 600; }
.lion-bars .track { height: .8rem; }
.lion-bars .fill { display: block; height: 100%; border-radius: 2px; box-sizing: border-box; min-width: 3px; }
.lion-bars .weight { font-variant-numeric: tabular-nums; font-size: .85rem; color: var(--lion-muted); }

.lion-columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 2rem; }
.lion-columns > input, .lion-columns > label { display: none; }
@media (max-width: 40rem) {
  .lion-columns { display: block; }
  .lion-columns > input { display: inline-block; position: absolute; opacity: 0; }
  .lion-columns > label {
    display: inline-block; padding: .5rem .75rem; cursor: pointer; border-bottom: 3px solid transparent;
    color: var(--body-text-color);
  }
  .lion-columns > input:checked + label { border-color: var(--lion-own); font-weight: 600; }
  .lion-columns > input:focus-visible + label { outline: 3px solid var(--lion-new); }
  #lion-tab-0:not(:checked) ~ section:nth-of-type(1), #lion-tab-1:not(:checked) ~ section:nth-of-type(2) {
    display: none;
  }
}
.lion-hits { list-style: none; margin: 0; padding: 0; }
.lion-hit {
  border: 1px solid var(--lion-line); border-radius: 8px; background: var(--lion-card);
  padding: .75rem 1rem; margin: 0 0 .75rem; overflow-wrap: anywhere; position: relative;
}
.lion-hit h3 { font-size: 1rem; margin: 0; }
.lion-hit .rank { color: var(--lion-muted); margin-right: .6em; }
.lion-hit .relevant { color: var(--lion-good); font-weight: 600; }
.lion-why { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem; margin: .35rem 0; padding: 0; }
.lion-why li { margin: 0; padding: 0 .5em; border-radius: 4px; font-size: .85rem; position: relative; }
.lion-why .own { border: 1px solid var(--lion-own); --hue: var(--lion-own); }
.lion-why .new { border: 1px dashed var(--lion-new); --hue: var(--lion-new); }
.lion-why .own, .lion-why .new {
  background: linear-gradient(90deg, color-mix(in srgb, var(--hue) 28%, transparent) var(--share), transparent 0);
}
.lion-why .percent, .lion-why .more { color: var(--lion-muted); font-variant-numeric: tabular-nums; }
.lion-text { margin: .35rem 0 0; line-height: 1.55; white-space: pre-line; }
.lion-text mark, .lion-hit h3 mark {
  color: inherit; border-radius: 2px; padding: 0 1px;
  background: color-mix(in srgb, var(--hue) calc(10% + var(--share) * .35), transparent);
}
mark.own { --hue: var(--lion-own); text-decoration: underline solid var(--lion-own) 2px; text-underline-offset: 3px; }
mark.new { --hue: var(--lion-new); text-decoration: underline dotted var(--lion-new) 2px; text-underline-offset: 3px; }
.unread { color: var(--lion-muted); font-style: italic; }
.lion-rest summary { cursor: pointer; font-size: .85rem; color: var(--lion-muted); margin-top: .35rem; }
"""
