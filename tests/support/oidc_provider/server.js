// An identity provider that we did not write. It is given its settings as JSON, and says when it listens.
import fs from "node:fs";
import https from "node:https";
import { Provider } from "oidc-provider";

const { issuer, port, certificate, key, clients, jwks } = JSON.parse(process.argv[2]);
const provider = new Provider(issuer, {
  clients,
  jwks,
  claims: { openid: ["sub"], profile: ["name", "groups"] },
  conformIdTokenClaims: false,
  clientAuthMethods: ["none", "client_secret_basic"],
  cookies: { keys: ["a key of the tests"] },
  features: { deviceFlow: { enabled: true } },
  findAccount: (_, id) => ({
    accountId: id,
    claims: () => ({ sub: id, name: "Ada Lovelace", groups: ["fleet-admins"] }),
  }),
});
https
  .createServer({ cert: fs.readFileSync(certificate), key: fs.readFileSync(key) }, provider.callback())
  .listen(port, "127.0.0.1", () => console.log("listening"));
