#!/usr/bin/env bash
# Copy the page's libraries from the npm registry to serving/server/page/static/vendor, at the versions of npm/package-lock.json.
#   bash scripts/vendor_page.sh [FOLDER]    FOLDER: another place to put them, as the test of this script does
# To take newer ones: change npm/package.json, `npm install --ignore-scripts` in a copy of that folder, copy the lock back, run this.
set -euo pipefail
cd "$(dirname "$0")/.."
to="${1:-serving/server/page/static/vendor}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cp serving/server/page/npm/package.json serving/server/page/npm/package-lock.json "$work"
(cd "$work" && npm ci --ignore-scripts --no-audit --no-fund --silent)
modules="$work/node_modules"
rm -rf "$to"
mkdir -p "$to/licenses"
copy() { grep -v '^//# sourceMappingURL=' "$modules/$1" > "$to/$2"; }  # maps are left out
copy preact/dist/preact.mjs preact.js
copy preact/hooks/dist/hooks.mjs preact-hooks.js
sed -i 's|from"preact"|from"./preact.js"|' "$to/preact-hooks.js"  # browsers have no package names
copy htm/dist/htm.mjs htm.js
copy markdown-it/dist/browser/markdown-it.esm.min.mjs markdown-it.js
copy dompurify/dist/purify.es.mjs purify.js
copy @highlightjs/cdn-assets/es/highlight.min.js highlight.js
copy uplot/dist/uPlot.esm.js uplot.js
copy uplot/dist/uPlot.min.css uplot.css
copy idb-keyval/dist/index.js idb-keyval.js
# markdown-it's file holds five more packages.
for name in preact htm markdown-it entities linkify-it mdurl uc.micro punycode.js dompurify @highlightjs/cdn-assets uplot idb-keyval; do
    license="$(find "$modules/$name" -maxdepth 1 -iname 'LICEN[CS]E*' ! -name '*-MPL' | head -1)"
    [ -n "$license" ] || license="$modules/$name/LICENCE"
    cp "$license" "$to/licenses/$(tr / - <<< "${name#@}").txt"
done
(cd "$to" && find . -type f ! -name SHA256SUMS | LC_ALL=C sort | xargs sha256sum > SHA256SUMS)
