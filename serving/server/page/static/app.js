// The page: its head, the two views, language, colours, and the key.
import { html, render, useCallback, useEffect, useLayoutEffect, useState } from "./html.js";
import { ApiError, access, currentKey, forgetKey, keepKey, settings as loadSettings } from "./api.js";
import { preferredLanguage, translator } from "./i18n.js";

// Loaded when they are looked at, so that the head shows at once.
const VIEWS = {
  chat: async () => (await import("./chat/view.js")).ChatView,
  live: async () => (await import("./live/view.js")).LiveView,
};

function viewOfAddress() {
  const name = location.hash.replace(/^#\/?/, "");
  return name in VIEWS ? name : "chat";
}

function preferredTheme() {
  const kept = localStorage.getItem("theme");
  if (kept === "light" || kept === "dark") return kept;
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

function useView() {
  const [view, setView] = useState(viewOfAddress());
  useEffect(() => {
    const changed = () => setView(viewOfAddress());
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  }, []);
  return view;
}

// The component of a view; null until it is loaded. Each `attempt` asks for one that is missing again.
function useLoaded(view, attempt, onError) {
  const [loaded, setLoaded] = useState({});
  useEffect(() => {
    if (loaded[view]) return;
    VIEWS[view]().then((View) => setLoaded((others) => ({ ...others, [view]: View })), onError);
  }, [view, attempt]);
  return loaded[view] ?? null;
}

// A choice that is kept in this browser and stands in an attribute of <html>.
function useKept(name, initial, attribute) {
  const [value, setValue] = useState(initial);
  useLayoutEffect(() => document.documentElement.setAttribute(attribute, value), [value]);
  const choose = (next) => {
    localStorage.setItem(name, next);
    setValue(next);
  };
  return [value, choose];
}

function Head({ t, view, language, setLanguage, theme, setTheme, onForget }) {
  const next = theme === "dark" ? "light" : "dark";
  const link = (name) => html`
    <a href=${`#/${name}`} aria-current=${view === name ? "page" : undefined}>${t(`nav.${name}`)}</a>
  `;
  return html`
    <header class="top">
      <a class="skip" href="#content" onClick=${focusContent}>${t("skip")}</a>
      <div class="brand"><img src="page/icon.svg" alt="" /><span>GLM Foundry</span></div>
      <nav aria-label=${t("nav.label")}>${link("chat")}${link("live")}</nav>
      <div class="space"></div>
      ${onForget && html`<button class="button plain" onClick=${onForget}>${t("key.forget")}</button>`}
      <button class="button plain" aria-label=${t("theme.label", { next: t(`theme.${next}`) })} onClick=${() => setTheme(next)}>
        <span aria-hidden="true">${theme === "dark" ? "☀" : "☾"}</span>
      </button>
      <button
        class="button plain"
        lang=${language === "zh" ? "en" : "zh"}
        aria-label=${t("language.label")}
        onClick=${() => setLanguage(language === "zh" ? "en" : "zh")}
      >
        ${t("language")}
      </button>
    </header>
  `;
}

function focusContent(event) {
  event.preventDefault();
  document.getElementById("content").focus();
}

function KeyForm({ t, refused, onKey }) {
  const [key, setKey] = useState("");
  const [remember, setRemember] = useState(false);
  const submit = (event) => {
    event.preventDefault();
    onKey(key.trim(), remember);
  };
  return html`
    <form class="notice key" onSubmit=${submit}>
      <h1>${t("key.title")}</h1>
      <label>
        ${t("key.field")}
        <input class="field" type="password" autocomplete="off" required value=${key} onInput=${(event) => setKey(event.target.value)} />
      </label>
      <label>
        <input type="checkbox" checked=${remember} onChange=${(event) => setRemember(event.target.checked)} />
        ${t("key.remember")}
      </label>
      ${refused && html`<p role="alert">${t("key.wrong")}</p>`}
      <button class="button primary" type="submit">${t("key.open")}</button>
    </form>
  `;
}

function App() {
  const [language, setLanguage] = useKept("language", preferredLanguage(), "lang");
  const [theme, setTheme] = useKept("theme", preferredTheme(), "data-theme");
  const [state, setState] = useState({ kind: "loading" });
  const view = useView();
  const [attempt, setAttempt] = useState(0);
  const View = useLoaded(view, attempt, (error) => setState({ kind: "error", reason: error.message }));
  const t = translator(language);

  const open = useCallback(async () => {
    setState({ kind: "loading" });
    setAttempt((count) => count + 1);
    try {
      const { needs_key: needsKey } = await access();
      if (needsKey && !currentKey()) {
        setState({ kind: "key", refused: false });
        return;
      }
      setState({ kind: "open", needsKey, settings: await loadSettings() });
    } catch (error) {
      const refused = error instanceof ApiError && error.status === 401;
      if (refused) forgetKey();
      setState(refused ? { kind: "key", refused } : { kind: "error", reason: error.message });
    }
  }, []);
  useEffect(() => void open(), []);

  const onKey = (key, remember) => {
    keepKey(key, remember);
    open();
  };
  const onForget = () => {
    forgetKey();
    open();
  };
  let content;
  if (state.kind === "loading" || (state.kind === "open" && !View)) content = html`<p class="notice" role="status">${t("loading")}</p>`;
  if (state.kind === "key") content = html`<${KeyForm} t=${t} refused=${state.refused} onKey=${onKey} />`;
  if (state.kind === "error") {
    content = html`
      <div class="notice error" role="alert">
        <p>${t("unreachable", { reason: state.reason })}</p>
        <button class="button" onClick=${open}>${t("again")}</button>
      </div>
    `;
  }
  if (state.kind === "open" && View) {
    content = html`<${View} settings=${state.settings} t=${t} language=${language} theme=${theme} />`;
  }
  const head = { t, view, language, setLanguage, theme, setTheme };
  return html`
    <${Head} ...${head} onForget=${state.needsKey ? onForget : null} />
    <main id="content" tabindex="-1">${content}</main>
  `;
}

render(html`<${App} />`, document.getElementById("app"));
