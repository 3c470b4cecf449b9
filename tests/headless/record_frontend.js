// Renews the prompts in frontend.json: node record_frontend.js URL CHROMIUM
// URL is that of a ComfyUI 0.3.64 (frontend 1.27.10) which has stub_nodes.py in its custom_nodes and a.png and
// example.png in its input folder. Needs the package playwright-core.
const { chromium } = require('playwright-core')
const fs = require('fs')
const path = require('path')

const file = path.join(__dirname, 'frontend.json')

const convert = async (workflow) => {
  const quiet = { showMissingNodesDialog: false, showMissingModelsDialog: false }
  await window.app.loadGraphData(workflow, true, true, null, quiet)
  await new Promise((resolve) => setTimeout(resolve, 60)) // primitives and reroutes settle in the next frame
  return (await window.app.graphToPrompt()).output
}

const main = async ([url, executablePath]) => {
  const browser = await chromium.launch({ executablePath, args: ['--no-sandbox'] })
  const page = await browser.newPage()
  await page.goto(url)
  await page.waitForFunction(() => window.app?.graph && window.app.extensionManager)
  await page.waitForTimeout(5000)
  const cases = JSON.parse(fs.readFileSync(file, 'utf8'))
  for (const entry of cases) {
    entry.prompt = await page.evaluate(convert, entry.workflow)
    await page.keyboard.press('Escape')
  }
  await browser.close()
  fs.writeFileSync(file, `[\n${cases.map((entry) => JSON.stringify(entry)).join(',\n')}\n]\n`)
}

main(process.argv.slice(2))
