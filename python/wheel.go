package python

import (
	"archive/zip"
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"regexp"
	"strings"
	"time"
)

// Wheel returns a wheel of the module for pip, for any Python, and its file name.
// Of a version that is none ("dev") it makes 0. The same version gives the same
// bytes.
func Wheel(version string) (name string, text []byte, err error) {
	number := regexp.MustCompile(`^[0-9]+(\.[0-9]+)*`).FindString(strings.TrimPrefix(version, "v"))
	if number == "" {
		number = "0"
	}
	info := "curvefs-" + number + ".dist-info/"
	files := [][2]string{
		{"curvefs.py", Curvefs},
		{info + "METADATA", "Metadata-Version: 2.1\nName: curvefs\nVersion: " + number + "\nSummary: Curve's block storage calls, on Atoll\nLicense: Apache-2.0\nRequires-Python: >=2.7,!=3.0.*,!=3.1.*,!=3.2.*,!=3.3.*,!=3.4.*,!=3.5.*\n"},
		{info + "WHEEL", "Wheel-Version: 1.0\nGenerator: atoll\nRoot-Is-Purelib: true\nTag: py2-none-any\nTag: py3-none-any\n"},
	}
	var record strings.Builder
	for _, f := range files {
		sum := sha256.Sum256([]byte(f[1]))
		fmt.Fprintf(&record, "%s,sha256=%s,%d\n", f[0], base64.RawURLEncoding.EncodeToString(sum[:]), len(f[1]))
	}
	fmt.Fprintf(&record, "%sRECORD,,\n", info)
	files = append(files, [2]string{info + "RECORD", record.String()})
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	for _, f := range files {
		h := &zip.FileHeader{Name: f[0], Method: zip.Deflate, Modified: time.Date(1980, 1, 1, 0, 0, 0, 0, time.UTC)}
		h.SetMode(0o644)
		w, err := z.CreateHeader(h)
		if err == nil {
			_, err = w.Write([]byte(f[1]))
		}
		if err != nil {
			return "", nil, fmt.Errorf("make wheel: %w", err)
		}
	}
	if err := z.Close(); err != nil {
		return "", nil, fmt.Errorf("make wheel: %w", err)
	}
	return "curvefs-" + number + "-py2.py3-none-any.whl", b.Bytes(), nil
}
