package access_test

import (
	"bytes"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/access"
)

func policy(t testing.TB) *access.Policy {
	t.Helper()
	p, err := access.New(access.Operations()...)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// matrix reads testdata/matrix.txt: the table as people signed it off, kept
// apart from the code so that a changed cell is a changed line in review.
func matrix(t *testing.T) map[kms.Operation]map[access.Role]bool {
	t.Helper()
	b, err := os.ReadFile("testdata/matrix.txt")
	if err != nil {
		t.Fatal(err)
	}
	cells := make(map[kms.Operation]map[access.Role]bool)
	for line := range strings.Lines(string(b)) {
		line, _, _ = strings.Cut(strings.TrimSpace(line), "#")
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		if len(f) != 1+len(access.Roles()) {
			t.Fatalf("matrix line %q: got %d fields, want %d", line, len(f), 1+len(access.Roles()))
		}
		row := make(map[access.Role]bool)
		for i, r := range access.Roles() {
			row[r] = f[i+1] == "yes"
		}
		cells[kms.Operation(f[0])] = row
	}
	return cells
}

func TestMatrixEveryCell(t *testing.T) {
	p, want, seen := policy(t), matrix(t), 0
	for _, op := range access.Operations() {
		row, ok := want[op]
		if !ok {
			t.Errorf("operation %s is not in testdata/matrix.txt", op)
			continue
		}
		for _, role := range access.Roles() {
			grants := []kms.Grant{{Principal: "person/a", Role: role.String(), Scope: "/"}}
			got := p.Decide(kms.Caller{Principal: "person/a"}, op, "/vaults/v", grants)
			if got.Allowed != row[role] {
				t.Errorf("%s may %s: got %v, want %v (%s)", role, op, got.Allowed, row[role], got.Rule)
			}
			if got.Rule == "" {
				t.Errorf("%s may %s: no rule for the record", role, op)
			}
			seen++
		}
	}
	if want := len(want) * len(access.Roles()); seen != want || seen < 29*9 {
		t.Errorf("cells: got %d, want %d", seen, want)
	}
}

// TestEveryOperationHasARow reads the constants of kms from its source, so
// that a new operation can't be forgotten.
func TestEveryOperationHasARow(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "../api.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ops []kms.Operation
	ast.Inspect(file, func(n ast.Node) bool {
		v, ok := n.(*ast.ValueSpec)
		if !ok || len(v.Values) != 1 {
			return true
		}
		if id, ok := v.Type.(*ast.Ident); !ok || id.Name != "Operation" {
			return true
		}
		s, err := strconv.Unquote(v.Values[0].(*ast.BasicLit).Value)
		if err != nil {
			t.Fatal(err)
		}
		ops = append(ops, kms.Operation(s))
		return true
	})
	if len(ops) < 29 {
		t.Fatalf("operations found in kms/api.go: got %d, want at least 29", len(ops))
	}
	if _, err := access.New(ops...); err != nil {
		t.Error(err)
	}
	for _, op := range access.Operations() {
		if !slices.Contains(ops, op) {
			t.Errorf("row for %q, which is no operation", op)
		}
	}
}

func TestNewRefusesUnknownOperation(t *testing.T) {
	if _, err := access.New(kms.OpStatus, "keyring.export"); !errors.Is(err, dek.ErrInvalid) {
		t.Errorf("got %v, want dek.ErrInvalid", err)
	}
}

func TestDecideDenies(t *testing.T) {
	good := kms.Grant{Principal: "host/db1", Role: "service encryption user", Scope: "/vaults/pay"}
	tests := []struct {
		name  string
		edit  func(c *kms.Caller, op *kms.Operation, scope *string, g *kms.Grant)
		allow bool
	}{
		{"untouched", func(*kms.Caller, *kms.Operation, *string, *kms.Grant) {}, true},
		{"nobody", func(c *kms.Caller, _ *kms.Operation, _ *string, _ *kms.Grant) { c.Principal = "" }, false},
		{"nobody, empty grant", func(c *kms.Caller, _ *kms.Operation, _ *string, g *kms.Grant) { c.Principal, g.Principal = "", "" }, false},
		{"other principal", func(c *kms.Caller, _ *kms.Operation, _ *string, _ *kms.Grant) { c.Principal = "host/db2" }, false},
		{"prefix of the name", func(c *kms.Caller, _ *kms.Operation, _ *string, _ *kms.Grant) { c.Principal = "host/db" }, false},
		{"unknown operation", func(_ *kms.Caller, op *kms.Operation, _ *string, _ *kms.Grant) { *op = "keyring.export" }, false},
		{"empty operation", func(_ *kms.Caller, op *kms.Operation, _ *string, _ *kms.Grant) { *op = "" }, false},
		{"unknown role", func(_ *kms.Caller, _ *kms.Operation, _ *string, g *kms.Grant) { g.Role = "root" }, false},
		{"implicit role by name", func(_ *kms.Caller, op *kms.Operation, _ *string, g *kms.Grant) {
			g.Role, *op = "any identity", kms.OpKeyringRead
		}, false},
		{"neighbour vault", func(_ *kms.Caller, _ *kms.Operation, s *string, _ *kms.Grant) { *s = "/vaults/pay2/keyrings/r" }, false},
		{"parent", func(_ *kms.Caller, _ *kms.Operation, s *string, _ *kms.Grant) { *s = "/" }, false},
		{"dotted", func(_ *kms.Caller, _ *kms.Operation, s *string, _ *kms.Grant) { *s = "/vaults/pay/../hr/keyrings/r" }, false},
		{"double slash", func(_ *kms.Caller, _ *kms.Operation, s *string, _ *kms.Grant) { *s = "/vaults/pay//keyrings/r" }, false},
		{"trailing slash", func(_ *kms.Caller, _ *kms.Operation, s *string, _ *kms.Grant) { *s = "/vaults/pay/" }, false},
		{"other case", func(_ *kms.Caller, _ *kms.Operation, s *string, _ *kms.Grant) { *s = "/vaults/PAY/keyrings/r" }, false},
		{"empty path under root grant", func(_ *kms.Caller, _ *kms.Operation, s *string, g *kms.Grant) { *s, g.Scope = "", "/" }, false},
		{"keyring grant, sibling", func(_ *kms.Caller, _ *kms.Operation, _ *string, g *kms.Grant) {
			g.Scope = "/vaults/pay/keyrings/other"
		}, false},
		{"keyring grant, longer name", func(_ *kms.Caller, _ *kms.Operation, s *string, g *kms.Grant) {
			g.Scope, *s = "/vaults/pay/keyrings/r", "/vaults/pay/keyrings/r2"
		}, false},
		{"keyring grant, itself", func(_ *kms.Caller, _ *kms.Operation, _ *string, g *kms.Grant) { g.Scope = "/vaults/pay/keyrings/r" }, true},
		{"root grant", func(_ *kms.Caller, _ *kms.Operation, _ *string, g *kms.Grant) { g.Scope = "/" }, true},
	}
	p := policy(t)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, op, scope, g := kms.Caller{Principal: "host/db1"}, kms.OpKeyringUnwrap, "/vaults/pay/keyrings/r", good
			tt.edit(&c, &op, &scope, &g)
			if got := p.Decide(c, op, scope, []kms.Grant{g}); got.Allowed != tt.allow {
				t.Errorf("got %+v, want allowed %v", got, tt.allow)
			}
		})
	}
}

func TestImplicitRights(t *testing.T) {
	p := policy(t)
	for _, op := range access.Operations() {
		tests := []struct {
			principal string
			want      bool
		}{
			{"", op == kms.OpEnroll},
			{"person/a", op == kms.OpEnroll || op == kms.OpRenew},
			{"system/kms", op == kms.OpEnroll},
			{"local/other", op == kms.OpEnroll},
		}
		for _, tt := range tests {
			if got := p.Decide(kms.Caller{Principal: tt.principal}, op, "/", nil); got.Allowed != tt.want {
				t.Errorf("%q may %s: got %v, want %v", tt.principal, op, got.Allowed, tt.want)
			}
		}
	}
}

func TestLocalRoot(t *testing.T) {
	p, want := policy(t), matrix(t)
	for _, op := range access.Operations() {
		allow := want[op][access.BackupOperator] || want[op][access.Auditor]
		allow = allow && op != kms.OpRenew // it has no certificate to renew
		if got := p.Decide(kms.Caller{Principal: access.LocalRoot}, op, "/", nil); got.Allowed != allow {
			t.Errorf("local root may %s: got %v, want %v", op, got.Allowed, allow)
		}
	}
	// A grant changes nothing, even one that slipped into the store.
	g := []kms.Grant{{Principal: access.LocalRoot, Role: "crypto user", Scope: "/"}}
	if got := p.Decide(kms.Caller{Principal: access.LocalRoot}, kms.OpKeyringUnwrap, "/vaults/v/keyrings/r", g); got.Allowed {
		t.Errorf("local root unwraps by grant: %+v", got)
	}
}

func TestCheckGrant(t *testing.T) {
	p := policy(t)
	good := kms.Grant{Principal: "person/a", Role: "auditor", Scope: "/", By: "person/admin"}
	tests := []struct {
		name string
		edit func(*kms.Grant)
		want error
	}{
		{"untouched", func(*kms.Grant) {}, nil},
		{"vault", func(g *kms.Grant) { g.Scope = "/vaults/v" }, nil},
		{"key", func(g *kms.Grant) { g.Scope = "/vaults/v/keys/k" }, nil},
		{"keyring", func(g *kms.Grant) { g.Scope = "/vaults/v/keyrings/k" }, nil},
		{"unknown role", func(g *kms.Grant) { g.Role = "god" }, dek.ErrInvalid},
		{"role as people spell it", func(g *kms.Grant) { g.Role = "crypto-officer" }, dek.ErrInvalid},
		{"implicit role", func(g *kms.Grant) { g.Role = "anyone" }, dek.ErrInvalid},
		{"no role", func(g *kms.Grant) { g.Role = "" }, dek.ErrInvalid},
		{"nobody", func(g *kms.Grant) { g.Principal = "" }, dek.ErrInvalid},
		{"system", func(g *kms.Grant) { g.Principal = "system/kms" }, dek.ErrInvalid},
		{"local root", func(g *kms.Grant) { g.Principal = access.LocalRoot }, dek.ErrInvalid},
		{"star", func(g *kms.Grant) { g.Principal = "person/*" }, dek.ErrInvalid},
		{"two slashes", func(g *kms.Grant) { g.Principal = "person/a/b" }, dek.ErrInvalid},
		{"no scope", func(g *kms.Grant) { g.Scope = "" }, dek.ErrInvalid},
		{"relative", func(g *kms.Grant) { g.Scope = "vaults/v" }, dek.ErrInvalid},
		{"trailing slash", func(g *kms.Grant) { g.Scope = "/vaults/v/" }, dek.ErrInvalid},
		{"all vaults", func(g *kms.Grant) { g.Scope = "/vaults" }, dek.ErrInvalid},
		{"unknown kind", func(g *kms.Grant) { g.Scope = "/vaults/v/secrets/s" }, dek.ErrInvalid},
		{"dots", func(g *kms.Grant) { g.Scope = "/vaults/.." }, dek.ErrInvalid},
		{"self", func(g *kms.Grant) { g.By = g.Principal }, dek.ErrPrecondition},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := good
			tt.edit(&g)
			if err := p.CheckGrant(g, nil, true); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}

// TestStrictConflicts walks every pair of roles over scopes that differ.
func TestStrictConflicts(t *testing.T) {
	p := policy(t)
	apart := [][]string{
		{"administrator"}, {"crypto officer", "secrets officer"},
		{"crypto user", "service encryption user", "secrets user"},
		{"purge approver"}, {"auditor"},
	}
	group := func(r access.Role) int {
		return slices.IndexFunc(apart, func(g []string) bool { return slices.Contains(g, r.String()) })
	}
	for _, a := range access.Roles() {
		for _, b := range access.Roles() {
			want := group(a) >= 0 && group(b) >= 0 && group(a) != group(b)
			held := []kms.Grant{{Principal: "person/a", Role: a.String(), Scope: "/vaults/one/keys/k"}}
			g := kms.Grant{Principal: "person/a", Role: b.String(), Scope: "/vaults/two", By: "person/admin"}
			if err := p.CheckGrant(g, held, true); errors.Is(err, dek.ErrPrecondition) != want {
				t.Errorf("%s then %s: got %v, want refused %v", a, b, err, want)
			}
			if err := p.CheckGrant(g, held, false); err != nil {
				t.Errorf("%s then %s, not strict: %v", a, b, err)
			}
			g.Principal = "person/b"
			if err := p.CheckGrant(g, held, true); err != nil {
				t.Errorf("%s for a, %s for b: %v", a, b, err)
			}
		}
	}
}

// TestNoDutyReachesKeyUse is the rule behind the conflicts: in strict mode no
// principal that decides over keys or people can have one used.
func TestNoDutyReachesKeyUse(t *testing.T) {
	cells := matrix(t)
	for _, role := range access.Roles() {
		decides := cells[kms.OpGrantAdd][role] || cells[kms.OpKeyCreate][role] || cells[kms.OpAuditRead][role]
		for _, other := range access.Roles() {
			if decides && cells[kms.OpKeyringUnwrap][other] && !access.Conflict(role, other) {
				t.Errorf("strict mode lets one principal be %s and %s", role, other)
			}
		}
	}
}

func TestParseRole(t *testing.T) {
	for _, r := range access.Roles() {
		for _, s := range []string{r.String(), strings.ReplaceAll(r.String(), " ", "-")} {
			if got, err := access.ParseRole(s); got != r || err != nil {
				t.Errorf("ParseRole(%q): got %v, %v, want %v", s, got, err, r)
			}
		}
		if r.Text() == "" {
			t.Errorf("%s has no text", r)
		}
	}
	for _, s := range []string{"", "Auditor", "anyone", "crypto  officer", "role 0"} {
		if got, err := access.ParseRole(s); !errors.Is(err, dek.ErrInvalid) || got != 0 {
			t.Errorf("ParseRole(%q): got %v, %v, want dek.ErrInvalid", s, got, err)
		}
	}
}

func TestWriteTable(t *testing.T) {
	var b bytes.Buffer
	if err := access.WriteTable(&b); err != nil {
		t.Fatal(err)
	}
	if got, want := bytes.Count(b.Bytes(), []byte("\n")), len(access.Operations())+1; got != want {
		t.Errorf("lines: got %d, want %d", got, want)
	}
	for _, op := range access.Operations() {
		if !strings.Contains(b.String(), string(op)) {
			t.Errorf("%s is missing", op)
		}
	}
}

func FuzzDecideScope(f *testing.F) {
	for _, s := range []string{"/", "/vaults/v", "/vaults/v/keyrings/r", "", "//", "/vaults/v/..", "/vaults/v\x00"} {
		f.Add("/vaults/v", s)
	}
	p := policy(f)
	f.Fuzz(func(t *testing.T, scope, target string) {
		g := kms.Grant{Principal: "host/a", Role: "service encryption user", Scope: scope}
		if p.CheckGrant(g, nil, false) != nil {
			return
		}
		d := p.Decide(kms.Caller{Principal: "host/a"}, kms.OpKeyringUnwrap, target, []kms.Grant{g})
		below := scope == "/" || target == scope || strings.HasPrefix(target, scope+"/")
		if d.Allowed && (!below || strings.Contains(target, "//") || strings.Contains(target, ".")) {
			t.Errorf("grant at %q reaches %q", scope, target)
		}
	})
}

func BenchmarkDecide(b *testing.B) {
	p := policy(b)
	g := []kms.Grant{{Principal: "host/db1", Role: "service encryption user", Scope: "/vaults/pay/keyrings/r"}}
	for b.Loop() {
		p.Decide(kms.Caller{Principal: "host/db1"}, kms.OpKeyringUnwrap, "/vaults/pay/keyrings/r", g)
	}
}
