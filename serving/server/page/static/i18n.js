// The page's words in English and Chinese. Parts add theirs with addWords().
const words = { en: {}, zh: {} };

export function addWords(table) {
  for (const [name, [en, zh]] of Object.entries(table)) {
    words.en[name] = en;
    words.zh[name] = zh;
  }
}

export function preferredLanguage() {
  const kept = localStorage.getItem("language");
  if (kept === "en" || kept === "zh") return kept;
  return navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
}

// t("answers", {count: 3}): "{count} answers" with 3 in its place. A name without words shows as it is.
export function translator(language) {
  return function t(name, values = {}) {
    const text = words[language][name] ?? name;
    return text.replace(/\{(\w+)\}/g, (whole, key) => (key in values ? String(values[key]) : whole));
  };
}

addWords({
  "nav.chat": ["Chat", "对话"],
  "nav.live": ["Live", "实况"],
  "nav.label": ["Pages", "页面"],
  "skip": ["Skip to the content", "跳到正文"],
  "language": ["中文", "English"],
  "language.label": ["切换到中文", "Switch to English"],
  "theme.light": ["Light", "浅色"],
  "theme.dark": ["Dark", "深色"],
  "theme.label": ["Colours: change to {next}", "配色：改为{next}"],
  "key.title": ["This server wants an API key", "此服务器需要 API 密钥"],
  "key.field": ["API key", "API 密钥"],
  "key.remember": ["Remember it in this browser", "在此浏览器中记住"],
  "key.open": ["Open", "进入"],
  "key.wrong": ["The server does not take this key", "服务器不接受此密钥"],
  "key.forget": ["Forget the key", "清除密钥"],
  "loading": ["Loading ...", "正在加载……"],
  "unreachable": ["The server does not answer: {reason}", "服务器没有响应：{reason}"],
  "again": ["Try again", "重试"],
});
