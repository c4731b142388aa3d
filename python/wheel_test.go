package python

import (
	"archive/zip"
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"strings"
	"testing"
)

// A wheel holds the module and an exact record of its files, under a version that
// pip takes.
func TestWheel(t *testing.T) {
	for version, number := range map[string]string{"dev": "0", "v1.2.3": "1.2.3", "1.2-5-gabc": "1.2", "": "0"} {
		name, text, err := Wheel(version)
		if err != nil || name != "curvefs-"+number+"-py2.py3-none-any.whl" {
			t.Fatalf("%q: %s %v", version, name, err)
		}
		if _, again, _ := Wheel(version); !bytes.Equal(text, again) {
			t.Errorf("%q: twice is not the same", version)
		}
		z, err := zip.NewReader(bytes.NewReader(text), int64(len(text)))
		if err != nil {
			t.Fatal(err)
		}
		files, want := map[string]string{}, ""
		for _, f := range z.File {
			r, err := f.Open()
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			files[f.Name] = string(b)
			if sum := sha256.Sum256(b); strings.HasSuffix(f.Name, "/RECORD") {
				want += f.Name + ",,\n"
			} else {
				want += fmt.Sprintf("%s,sha256=%s,%d\n", f.Name, base64.RawURLEncoding.EncodeToString(sum[:]), len(b))
			}
		}
		info := "curvefs-" + number + ".dist-info/"
		if files["curvefs.py"] != Curvefs || files[info+"RECORD"] != want || !strings.Contains(files[info+"METADATA"], "\nVersion: "+number+"\n") || files[info+"WHEEL"] == "" {
			t.Errorf("%q: the wheel holds %d files, recorded as %q", version, len(files), files[info+"RECORD"])
		}
	}
}
