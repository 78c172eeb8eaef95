# Sourced by test.sh: installs Chromium for the page's tests, where this is root on a system with apt and there is none.
#   BROWSER=/usr/bin/google-chrome bash scripts/test.sh    another browser of the Chromium family
if [ -z "${BROWSER:-}" ] && ! command -v chromium > /dev/null && ! command -v google-chrome > /dev/null; then
    if command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
        echo "installing Chromium ..."
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } > /dev/null 2>&1 ||
            echo "Chromium could not be installed: the page's tests in a browser are skipped"
    else
        echo "there is no Chromium (apt install chromium): the page's tests in a browser are skipped"
    fi
fi
