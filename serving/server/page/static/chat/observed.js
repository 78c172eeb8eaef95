// What parts of the page show again when it changes.
import { useEffect, useReducer } from "../html.js";

export class Observed {
  #listeners = new Set();

  subscribe(listener) {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  changed() {
    for (const listener of [...this.#listeners]) listener();
  }
}

// Render the component again whenever `observed` changes; null is nothing to wait for.
export function useObserved(observed) {
  const [, again] = useReducer((count) => count + 1, 0);
  useEffect(() => observed?.subscribe(() => again()), [observed]);
}

export function useMedia(query) {
  const media = matchMedia(query);
  const [, again] = useReducer((count) => count + 1, 0);
  useEffect(() => {
    const changed = () => again();
    media.addEventListener("change", changed);
    return () => media.removeEventListener("change", changed);
  }, [query]);
  return media.matches;
}
