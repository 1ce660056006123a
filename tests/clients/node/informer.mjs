// An informer and an exec with the JavaScript client. Writes a line of JSON for each thing that it sees, and takes
// commands on standard input: `exec POD TEXT`, `stop`.
import { Exec, KubeConfig, CoreV1Api, makeInformer } from '@kubernetes/client-node';
import { createInterface } from 'node:readline';
import { PassThrough, Readable } from 'node:stream';

const [namespace, selector] = process.argv.slice(2);
const say = (what) => process.stdout.write(`${JSON.stringify(what)}\n`);

const config = new KubeConfig();
config.loadFromFile(process.env.KUBECONFIG);
const api = config.makeApiClient(CoreV1Api);
const list = () => api.listNamespacedConfigMap({ namespace, labelSelector: selector });
const path = `/api/v1/namespaces/${namespace}/configmaps`;
const informer = makeInformer(config, path, list, selector);

for (const event of ['add', 'update', 'delete']) {
  informer.on(event, (object) =>
    say({ event, name: object.metadata.name, value: object.data?.value ?? null, version: object.metadata.resourceVersion }));
}
informer.on('error', (error) => {
  say({ event: 'error', message: String(error?.message ?? error) });
  // As its documentation says: start again after a while.
  setTimeout(() => informer.start().catch(() => {}), 200);
});
const begin = () => informer.start().then(() => say({ event: 'started' }), () => setTimeout(begin, 200));
begin();

const exec = async (pod, text) => {
  const stdout = new PassThrough();
  const stderr = new PassThrough();
  let out = '';
  stdout.on('data', (data) => { out += data; });
  const command = ['sh', '-c', 'cat; echo to stderr >&2; exit 3'];
  await new Exec(config).exec(namespace, pod, '', command, stdout, stderr, Readable.from([text]), false, (status) =>
    say({ event: 'exec', out, status: status.status, causes: status.details?.causes ?? [] }));
};

createInterface({ input: process.stdin }).on('line', (line) => {
  const [command, pod, ...rest] = line.split(' ');
  if (command === 'exec') {
    exec(pod, rest.join(' ')).catch((error) => say({ event: 'exec', error: String(error) }));
  } else if (command === 'stop') {
    informer.stop().then(() => process.exit(0));
  }
});
