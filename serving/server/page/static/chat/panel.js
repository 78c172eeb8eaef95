// The settings of a conversation: model, system prompt, parameters, tools.
import { html, useEffect, useRef, useState } from "../html.js";
import { useChat } from "./context.js";
import { IconButton } from "./icons.js";
import { PARAMETERS, readParameter, serverDefault } from "./parameters.js";

export function Panel({ onClose }) {
  const { t, chat, settings } = useChat();
  const { system, tools } = chat.open;
  const [isKept, setKept] = useState(false);
  const panel = useRef(null);
  useEffect(() => panel.current.querySelector("select").focus(), []);
  const keep = () => {
    chat.keepSetup();
    setKept(true);
    chat.say(t("setup.kept"));
  };
  useEffect(() => setKept(false), [chat.open, JSON.stringify([chat.open.model, system, chat.open.parameters, tools])]);
  const hasTools = settings.takes_tools && settings.tools?.length > 0;
  return html`
    <div class="side-head">
      <h2>${t("settings")}</h2>
      <${IconButton} icon="close" label=${t("settings.hide")} onClick=${onClose} />
    </div>
    <div class="panel" ref=${panel}>
      <${Model} />
      <label class="setting">
        <span>${t("system")}</span>
        <textarea
          class="field"
          rows="4"
          placeholder=${t("system.placeholder")}
          value=${system}
          onInput=${(event) => chat.setUp({ system: event.target.value })}
        ></textarea>
      </label>
      <fieldset>
        <legend>${t("parameters")}</legend>
        ${PARAMETERS.map((parameter) => html`<${Parameter} key=${chat.open.id + parameter.name} parameter=${parameter} />`)}
      </fieldset>
      ${hasTools && html`<${Tools} />`}
      <div class="buttons">
        <button type="button" class="button" onClick=${keep}>${t(isKept ? "setup.kept" : "setup.keep")}</button>
        <button type="button" class="button plain" onClick=${() => chat.setUp({ parameters: {}, model: null })}>${t("setup.reset")}</button>
      </div>
    </div>
  `;
}

function Model() {
  const { t, chat, settings } = useChat();
  const chosen = chat.open.model ?? settings.model;
  const names = [settings.model];
  for (const { id, parent } of chat.models) {
    if (parent !== null && parent !== undefined) names.push(id);
  }
  const isGone = !names.includes(chosen);
  const choose = ({ target }) => chat.setUp({ model: target.value === settings.model ? null : target.value });
  return html`
    <label class="setting">
      <span>${t("model")}</span>
      <select class="field" value=${chosen} onChange=${choose}>
        ${names.map((name) => html`<option key=${name} value=${name}>${name}</option>`)}
        ${isGone && html`<option value=${chosen}>${t("model.gone", { model: chosen })}</option>`}
      </select>
    </label>
  `;
}

function Parameter({ parameter }) {
  const { t, chat, settings } = useChat();
  const { name } = parameter;
  const kept = chat.open.parameters[name] ?? null;
  const [text, setText] = useState(kept === null ? "" : String(kept));
  const { value, error, values } = readParameter(parameter, text);
  useEffect(() => {
    if (!error && value !== kept) setText(kept === null ? "" : String(kept));
  }, [kept]);
  const change = ({ target }) => {
    setText(target.value);
    const read = readParameter(parameter, target.value);
    const parameters = { ...chat.open.parameters };
    if (read.error || read.value === null) delete parameters[name];
    else parameters[name] = read.value;
    chat.setUp({ parameters });
  };
  const fallback = serverDefault(name, settings);
  const id = `parameter-${name}`;
  return html`
    <div class="parameter">
      <label for=${id}>${t(`parameter.${name}`)}</label>
      <input
        id=${id}
        class="field"
        inputmode=${parameter.least < 0 ? "text" : "decimal"}
        autocomplete="off"
        placeholder=${fallback ?? t(`parameter.${name}.default`)}
        value=${text}
        aria-invalid=${error ? "true" : undefined}
        aria-describedby=${`${id}-about`}
        onInput=${change}
      />
      <p id=${`${id}-about`} class=${error ? "wrong" : "muted"}>${error ? t(error, values) : t(`parameter.${name}.about`)}</p>
    </div>
  `;
}

function Tools() {
  const { t, chat, settings } = useChat();
  const { tools } = chat.open;
  const all = settings.tools.map((tool) => tool.function.name);
  const change = (changes) => chat.setUp({ tools: { ...tools, ...changes } });
  const choose = (name, isOn) => {
    const names = new Set(tools.names ?? all);
    if (isOn) names.add(name);
    else names.delete(name);
    change({ names: all.every((one) => names.has(one)) ? null : [...names] });
  };
  return html`
    <fieldset>
      <legend>${t("tools")}</legend>
      <label class="check">
        <input type="checkbox" role="switch" checked=${tools.on} onChange=${(event) => change({ on: event.target.checked })} />
        <span>${t("tools.use")}</span>
      </label>
      ${settings.tools.map(({ function: { name, description } }) => {
        const isOn = tools.names === null || tools.names.includes(name);
        return html`
          <label key=${name} class="check tool">
            <input type="checkbox" checked=${isOn} disabled=${!tools.on} onChange=${(event) => choose(name, event.target.checked)} />
            <span><b>${name}</b> <small class="muted">${firstLine(description)}</small></span>
          </label>
        `;
      })}
    </fieldset>
  `;
}

function firstLine(text) {
  return (text ?? "").split("\n")[0];
}
